"""Exports: whole folders that PyTorch and transformers open, and the way back, bit for bit."""

import ast
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from damage import damage
from exported_models import config_with, random_clips, random_texts, run_params, save_run
from helpers import FIRST_WORD
from safetensors.numpy import load, load_file, save, save_file

import vlmae
from data_pipelines.media.sampling import segment_times
from data_pipelines.media.transforms import eval_view
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.checksum import SKIP, SUMS
from data_pipelines.storage import waiting
from data_pipelines.text.tokenize import load_tokenizer
from vlmae.cli.run_experiment import with_source_tokenizer
from vlmae.config.tree import override
from vlmae.export import command, modeling_vlmae
from vlmae.export.folders import write_tensors
from vlmae.export.modeling_vlmae import VideoLanguageModel
from vlmae.models.scoring import match_scores
from vlmae.models.video_language import build_model
from vlmae.runs.atomic_files import new_folder
from vlmae.runs.checkpoint import load_params
from vlmae.runs.load import load_run, tokenizer_of
from vlmae.training.init_weights import read_initial, take_initial
from vlmae.weights import export_format
from vlmae.weights.export_format import load_export
from vlmae.weights.torch_names import from_torch, to_torch, torch_views

HEAD, TENSORS = "match_head.bias", "model.safetensors"
CHANGES = {
    "model.video.time_frames": 3,
    "model.selector.kind": "mlp",
    "model.fusion.kind": "multiway",
    "model.video.layout.relative_bias": "layer",
    "objectives.mcm": 1.0,
    "objectives.mcm_kind": "score",
    "objectives.mcm_len": 8,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return save_run(config_with(CHANGES), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "exported"
    command.export(workdir, out)
    return out


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """A copy of the folder, to be damaged in ways that checksums do not tell."""
    copy = Path(shutil.copytree(folder, tmp_path / "copied"))
    (copy / SUMS).unlink()
    return copy


def test_the_files(folder):
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "auto_vlmae.py",
        "config.json",
        "model.safetensors",
        "modeling_vlmae.py",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    }
    assert not folder.with_name("export_format.part").exists()
    source = Path(modeling_vlmae.__file__).read_text()
    assert (folder / "modeling_vlmae.py").read_text() == source


def test_a_long_export_gives_signs_of_life(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(waiting, "EVERY_SECS", 0.001)
    command.export(workdir, tmp_path / "again")
    assert "exporting as torch: 0 s\n" in capsys.readouterr().out


def test_the_way_back_is_equal_bit_for_bit(workdir, folder):
    """As parameters of another run, and with the run's config and tokenizer."""
    expected, step = load_params(workdir)
    found, found_step = load_params(folder)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(x.flags.c_contiguous for x in jax.tree.leaves(found))
    assert found_step == step == 7
    config = load_run(workdir)
    assert load_run(folder) == config
    tokenizers = [load_tokenizer(tokenizer_of(path)) for path in (workdir, folder)]
    assert tokenizers[0].words() == tokenizers[1].words()

    new = override(config, {"train.init_from": str(folder)})
    assert with_source_tokenizer(new).data.tokenizer == str(folder)
    start = jax.tree.map(jnp.asarray, run_params(new, seed=3))
    merged, report = take_initial(read_initial(new), start)
    assert report.startswith(f"from step 7 of {folder}: loaded {len(jax.tree.leaves(start))} ")
    jax.tree.map(np.testing.assert_array_equal, merged, expected)


def test_paths_of_the_machine_stay_at_home(workdir):
    config = load_run(workdir)
    paths = {"data.data_dir": "/home/me/data", "data.tokenizer": "/home/me/words"}
    paths |= {"train.init_from": "/home/me/runs/a"}
    params, step = load_params(workdir)
    described = json.dumps(export_format.describe(override(config, paths), params, step))
    assert "/home/me" not in described and described == json.dumps(
        export_format.describe(config, params, step)
    )


def test_tensors_are_written_as_by_the_library(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "b.weight": rng.normal(size=(3, 5)).astype("f4").T,  # a view, as kernels are
        "a.weight": rng.normal(size=(4,)).astype("f4"),
        "temperature": np.asarray(0.07, "f4"),
    }
    write_tensors(tmp_path, tensors)
    given = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written == save(given, metadata={"format": "pt"})
    for name, x in load(written).items():
        np.testing.assert_array_equal(x, tensors[name])


def test_writing_holds_one_tensor_more(tmp_path):
    """Not all of them once or twice more: exports of a B/16 have 0.84 GB."""
    params = {f"block_{i}": {"kernel": np.ones((512, 256), "f4")} for i in range(64)}
    size = 64 * params["block_0"]["kernel"].nbytes
    tracemalloc.start()
    write_tensors(tmp_path, torch_views(params))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 16


def test_names_are_bijective():
    params = {
        "a": {"kernel": np.arange(6, dtype="f4").reshape(2, 3), "bias": np.zeros(3, "f4")},
        "norm": {"scale": np.ones(3, "f4")},
        "word": {"embedding": np.ones((4, 2), "f4")},
        "temporal": {"embedding": np.ones((5, 2), "f4")},
        "relative_bias": {"block_0": np.ones((4, 2), "f4")},
        "temperature": np.asarray(0.07, "f4"),
    }
    tensors = to_torch(params)
    assert {name: x.shape for name, x in tensors.items()} == {
        "a.weight": (3, 2),
        "a.bias": (3,),
        "norm.weight": (3,),
        "word.weight": (4, 2),
        "temporal.embedding": (5, 2),
        "relative_bias.block_0": (4, 2),
        "temperature": (),
    }
    jax.tree.map(np.testing.assert_array_equal, from_torch(tensors), params)


@pytest.mark.parametrize(
    ("function", "value", "message"),
    [
        (to_torch, {"a": {"gain": np.ones(3, "f4")}}, "parameter a/gain .* no name in PyTorch"),
        (to_torch, {"a": {"kernel": np.ones((1, 2, 3), "f4")}}, "parameter a/kernel"),
        (to_torch, {"a": {"bias": np.ones(3, "f2")}}, "a/bias is float16"),
        (from_torch, {"a.gain": np.ones(3, "f4")}, "tensor a.gain .* no parameter"),
        (from_torch, {"a.bias": np.ones(3, "f8")}, "a.bias is float64"),
    ],
)
def test_unknown_names_are_errors(function, value, message):
    with pytest.raises(ValueError, match=message):
        function(value)


def test_the_exported_module_imports_nothing_but_torch():
    tree = ast.parse(Path(modeling_vlmae.__file__).read_text())
    standard = set(sys.stdlib_module_names)
    top = {name for node in tree.body for name in modules_of(node)}
    assert top - standard == {"torch"}
    anywhere = {name for node in ast.walk(tree) for name in modules_of(node)}
    assert anywhere - standard == {"torch", "safetensors", "PIL"}, "the last two where needed"


def test_the_exported_module_runs_without_all_that_made_it(folder):
    absent = ["jax", "flax", "numpy", "einops", "transformers", "tokenizers", "vlmae"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import torch;"
        "from modeling_vlmae import VideoLanguageModel as Model;"
        "model = Model.from_folder('.'); video = torch.zeros(2, 4, 16, 16, 3, dtype=torch.uint8);"
        "print(model(video, torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5)).shape)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.stdout == "torch.Size([2])\n", done.stderr


def modules_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def scores_of(model) -> np.ndarray:
    with torch.no_grad():
        inputs = map(torch.tensor, (random_clips(), *random_texts()))
        return model(*inputs).numpy()


def test_from_folder_scores_as_the_run_does(workdir, folder):
    config, (params, _) = load_run(workdir), load_params(workdir)

    def score(model, video, ids, mask):
        return match_scores(model, model.encode_video(video), model.encode_text(ids, mask))

    @jax.jit
    def run(params, *inputs):
        return build_model(config).apply({"params": params}, *inputs, method=score)

    expected = run(params, random_clips(), *random_texts())
    model = VideoLanguageModel.from_folder(folder)
    assert not model.training and not any(x.is_meta for x in model.state_dict().values())
    np.testing.assert_allclose(scores_of(model), expected, rtol=0, atol=1e-5)


@contextlib.contextmanager
def damaged_tensors(folder: Path) -> Iterator[None]:
    """Flips a bit of the last tensor within the block."""
    path = folder / TENSORS
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    try:
        yield
    finally:
        path.write_bytes(content)


def test_auto_model(folder, monkeypatch, tmp_path):
    """Loaded and saved again by transformers, without a missing or unexpected tensor."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    load = transformers.AutoModel.from_pretrained
    model, info = load(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = scores_of(VideoLanguageModel.from_folder(folder))
    model.eval()
    inputs = [torch.tensor(x) for x in (random_clips(), *random_texts())]
    with torch.no_grad():
        video, text = model.encode_video(inputs[0]), model.encode_text(*inputs[1:])
        np.testing.assert_array_equal(model.match(video, text).numpy(), expected)
        output = model(*inputs)
        logits = model.logits(video, text)
    torch.testing.assert_close(output.logits_per_video, logits)
    torch.testing.assert_close(output.logits_per_text, logits.T)
    model.save_pretrained(tmp_path / "again")
    again = VideoLanguageModel.from_folder(tmp_path / "again")
    np.testing.assert_array_equal(scores_of(again), expected)
    assert load_export(tmp_path / "again")[1] == load_export(folder)[1]
    with damaged_tensors(folder):
        with pytest.raises(ValueError, match=f"{TENSORS} is damaged: not what SHA256SUMS says"):
            load(folder, trust_remote_code=True)
        load(folder, trust_remote_code=True, check_files=False)


def videos_of_any_size() -> list[np.ndarray]:
    """Wide, tall, odd and of the model's own size; longer and shorter than its frames."""
    rng = np.random.default_rng(5)
    shapes = [(9, 31, 47), (3, 40, 22), (1, 64, 64), (4, 16, 16), (2, 17, 16)]
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]


def middles(clip: np.ndarray, count: int) -> np.ndarray:
    """The frames that are shown at the times of evaluation, if the clip lasts a second."""
    if len(clip) == 1:
        return clip
    return clip[(segment_times(1.0, count) * len(clip)).astype(int)]


def test_pictures_go_in_as_in_evaluation(workdir, folder, monkeypatch, tmp_path):
    """Pixels are equal, and embeddings to 1e-5: by torch alone, and by transformers' classes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    ours, torch_model = vlmae.load(workdir), VideoLanguageModel.from_folder(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    auto = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    config = load_run(workdir).data
    for clip in videos_of_any_size():
        chosen = middles(clip, config.eval.num_frames)
        frames = torch_model.prepare([clip])
        np.testing.assert_array_equal(frames[0].numpy(), eval_view(chosen, config.image_size))
        expected = ours.embed_video([chosen])
        pixels = processor(clip, return_tensors="pt")["pixel_values"]
        assert pixels.shape[2:] == (3, config.image_size, config.image_size)
        with torch.no_grad():
            found = [torch_model.get_video_features(frames), auto.get_video_features(pixels)]
        for x in found:
            np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=1e-5)
    texts = [f"w{FIRST_WORD} w{FIRST_WORD + 3}", "w5 w6 w7"]
    words = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    words.pop("token_type_ids", None)
    with torch.no_grad():
        found = auto.get_text_features(**words).numpy()
        output = auto(pixels, **words)
    np.testing.assert_allclose(found, ours.embed_text(texts), rtol=0, atol=1e-5)
    expected = ours.logits([chosen], texts)
    np.testing.assert_allclose(output.logits_per_video.numpy(), expected, rtol=0, atol=1e-4)


def test_what_is_no_clip_is_refused_with_its_shape(folder):
    model = VideoLanguageModel.from_folder(folder)
    with pytest.raises(ValueError, match=r"frames \[t h w 3\], not torch.float32 \[2, 8, 8"):
        model.prepare([np.zeros((2, 8, 8, 3), np.float32)])
    with pytest.raises(ValueError, match=r"float32 frames must be \[b f 3 16 16\], not \[1, 2"):
        model.get_video_features(torch.zeros(1, 2, 16, 16, 3))


def test_auto_tokenizer(workdir, folder):
    ours = load_tokenizer(workdir / "tokenizer")
    texts = [f"w{FIRST_WORD} w{FIRST_WORD + 3}", "w5 w6 w7 w8 w9 w10 w11 w12"]
    expected, mask = ours.encode(texts, 8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = tokenizer(texts, padding="max_length", truncation=True, return_tensors="np")
    np.testing.assert_array_equal(found["input_ids"], expected)
    np.testing.assert_array_equal(found["attention_mask"], mask)


def test_the_card_tells_what_was_run(folder):
    card = (folder / "README.md").read_text()
    for line in (
        "# experiment",
        "AutoModel.from_pretrained(",
        "VideoLanguageModel.from_folder(",
        "- `model.match(video, text)`",
        "| fusion | multiway, depth 1 |",
        "| trained on | shapes (train) |",
        "| retrieval/t2v_r1 | 12.34 |",
        "| step | 7 |",
        "| started from | scratch |",
        "jax 0.0",
        "License",
    ):
        assert line in card, line


def test_both_sides_read_one_version():
    assert export_format.FORMAT_VERSION == modeling_vlmae.FORMAT_VERSION


# --- bad input


def damage_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_random_damage(folder: Path, tmp_path: Path, seeds: range) -> None:
    """One damaged file each: both readers refuse it by its name, or read what was written."""
    names = ("config.json", TENSORS, "tokenizer.json", "vocab.txt", SUMS)
    expected, refused = load_params(folder)[0], 0
    for seed in seeds:
        rng, copy = random.Random(seed), Path(shutil.copytree(folder, tmp_path / str(seed)))
        path = copy / rng.choice((*names, TENSORS, TENSORS))
        content = path.read_bytes()
        damage(path, rng)
        if not path.exists() or path.read_bytes() != content:
            try:
                params = load_params(copy)[0]
            except UserError as error:
                assert path.name in str(error) or SUMS in str(error), (seed, error)
                refused += 1
            else:  # the checksums themselves, of a file that is not read
                assert path.name == SUMS, seed
                jax.tree.map(np.testing.assert_array_equal, params, expected)
            if path.name in ("config.json", TENSORS):  # what the PyTorch file reads
                with pytest.raises((ValueError, FileNotFoundError), match=path.name):
                    VideoLanguageModel.from_folder(copy)
        shutil.rmtree(copy)
    assert refused > 0.6 * len(seeds)


def test_damage_is_refused_by_name(folder, tmp_path):
    check_random_damage(folder, tmp_path, range(20))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_damages_are_refused_by_name(folder, tmp_path):
    check_random_damage(folder, tmp_path, range(200))


def test_checks_can_be_left_out(folder, monkeypatch):
    """For huge files; and after a change on purpose, which the message says how to allow."""
    with damaged_tensors(folder):
        for read in (load_params, VideoLanguageModel.from_folder):
            with pytest.raises(ValueError, match="is damaged: not what SHA256SUMS says"):
                read(folder)
        VideoLanguageModel.from_folder(folder, check_files=False)
        monkeypatch.setenv(SKIP, "1")
        load_params(folder)


def damage_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


READERS = [
    pytest.param(VideoLanguageModel.from_folder, id="torch"),
    pytest.param(load_params, id="back"),
]
DAMAGES = {
    "version": (lambda x: damage_config(x, format_version=2), "format_version is 2, but 1"),
    "json": (lambda x: (x / "config.json").write_text("{"), "config.json: not JSON"),
    "missing": (lambda x: damage_tensors(x, lambda t: t.pop(HEAD)), "head.bias is missing"),
    "extra": (
        lambda x: damage_tensors(x, lambda t: t.update({"more.bias": np.zeros(2, "f4")})),
        "more.bias is unexpected",
    ),
    "shape": (
        lambda x: damage_tensors(x, lambda t: t.update({HEAD: np.zeros(3, "f4")})),
        r"head.bias is [\[(]3,?[\])] instead of [\[(]2,?[\])]",
    ),
    "truncated": (lambda x: os.truncate(x / TENSORS, 1000), TENSORS),
    "pickle": (
        lambda x: (x / TENSORS).rename(x / "pytorch_model.bin"),
        "pytorch_model.bin.* pickle files",
    ),
    "part": (lambda x: damage_config(x, parts=["fusion", "wheel"]), "wheel|is unexpected"),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_export_is_refused_in_one_line(copied, name, read):
    damage, message = DAMAGES[name]
    damage(copied)
    with pytest.raises(ValueError, match=message) as error:
        read(copied)
    assert "\n" not in str(error.value)


def test_a_damaged_experiment_is_named(copied):
    """Of the run; the PyTorch side does not read it."""
    for experiment, message in (([], "experiment must be an object"), ({"seed": -1}, "--seed")):
        damage_config(copied, experiment=experiment)
        with pytest.raises(UserError, match=rf"config\.json: {message}"):
            load_run(copied)


@pytest.mark.parametrize("read", READERS)
def test_a_pickle_file_itself_is_refused(tmp_path, read):
    (tmp_path / "model.pt").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"model\.pt.* pickle files"):
        read(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")


def test_a_part_that_was_not_trained_is_named(tmp_path):
    config = config_with({"objectives.vtm": 0.0, "objectives.mlm": 0.0, "objectives.mvm": 0.0})
    command.export(save_run(config, tmp_path / "run"), tmp_path / "out")
    model = VideoLanguageModel.from_folder(tmp_path / "out")
    video = model.encode_video(torch.tensor(random_clips()))
    text = model.encode_text(*map(torch.tensor, random_texts()))
    assert model.similarity(video, text).shape == (3, 3)
    with pytest.raises(ValueError, match="the checkpoint holds no match_head"):
        model.match(video, text)


def test_an_export_never_overwrites(workdir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out exists and is no empty folder"):
        command.export(workdir, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_failed_export_leaves_nothing(workdir, tmp_path):
    """The checkpoint does not fit the config; then a file of the run is missing."""
    broken = Path(shutil.copytree(workdir, tmp_path / "run"))
    wider = override(load_run(workdir), {"model.embed_dim": 9})
    save_run(wider, broken, params=run_params(load_run(workdir)))
    with pytest.raises(ValueError, match=r"video_projection/dense/bias is \(8,\) instead of"):
        command.export(broken, tmp_path / "out")
    save_run(load_run(workdir), broken)
    (broken / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        command.export(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "a" / "b") as part:
        (part / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
