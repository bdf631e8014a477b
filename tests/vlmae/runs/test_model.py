"""A loaded model gives what the Flax model gives, for paths, frames and sentences."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from exported_models import CLASSES, FRAMES, config_with, params_with, random_clips, save_run
from PIL import Image

import vlmae
from data_pipelines.media.transforms import eval_view
from data_pipelines.media.video_writer import encode_video
from data_pipelines.schema.checks import UserError
from data_pipelines.text.tokenize import load_tokenizer
from vlmae.export.formats import export_run
from vlmae.models.scoring import choice_logits, match_options, match_scores, rank_answers
from vlmae.models.video_language import build_model
from vlmae.ops.multiple_choice import SLOT, Caption
from vlmae.runs.checkpoint import load_params
from vlmae.runs.load import load_run

SENTENCES = ["w5 w6 w7", "w8", "w9 w10"]
OPTIONS = [["w5 w6", "w7"], ["w8", "w9 w10"], ["w11", "w12"]]
NAMES = [f"w{number}" for number in range(20, 20 + CLASSES)]
BATCH = {"data.eval_batch_size": 2}  # so that three clips are two batches
RUNS = {
    "pretrained": BATCH,
    "sigmoid": BATCH | {"objectives.vtc_loss": "sigmoid"},
    "classifier": BATCH | {"data.task": "questions", "objectives.answer": 1.0},
    "decoder": BATCH
    | {
        "data.task": "questions",
        "data.answer_len": 5,
        "objectives.answer": 1.0,
        "objectives.answer_kind": "decoder",
        "evaluation.answers_top_k": 3,
    },
    "choices": BATCH
    | {
        "objectives.vtm": 0.0,
        "objectives.mcm": 1.0,
        "objectives.mcm_len": 12,
        "objectives.mcm_template": "{} or {}",
        "objectives.mcm_template_ids": (1, SLOT, 4, SLOT, 2),
    },
}

HEADS = {"classifier": "classifier", "decoder": "answer_decoder"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Callable[[str], Path]:
    """Makes the work directory of one of `RUNS`, once."""
    root = tmp_path_factory.mktemp("runs")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            config = config_with(RUNS[name] | {"name": name})
            dropped = {"choice_head", "classifier", "answer_decoder"} - {HEADS.get(name)}
            dropped |= set() if name == "sigmoid" else {"logit_bias"}
            known = name != "choices"  # its head has as many outputs as its template has slots
            save_run(config, folder, params_with(RUNS[name], without=dropped) if known else None)
            (folder / "classes.json").write_text(json.dumps({n: {"": 1} for n in NAMES}))
        return folder

    return make


def by_flax(folder: Path, method: Callable, *texts: np.ndarray) -> np.ndarray:
    """`method(bound model, encoded clips, *texts)` of the random clips, in one batch."""
    config, (params, _) = load_run(folder), load_params(folder)

    def run(model, video, *texts):
        return method(model, model.encode_video(video), *texts)

    apply = jax.jit(lambda params, *x: build_model(config).apply(params, *x, method=run))
    return jax.device_get(apply({"params": params}, random_clips(), *texts))


def tokens(folder: Path, texts: list[str]) -> Caption:
    return Caption(*load_tokenizer(folder / "tokenizer").encode(texts, 8))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_pretrained(workdir):
    folder = workdir("pretrained")

    def scores(model, video, ids, mask):
        text = model.encode_text(ids, mask)
        clips, sentences = model.embed_video(video).mean(axis=1), model.embed_text(text)
        logits = clips @ sentences.T / model.temperature()
        return clips, sentences, logits, match_scores(model, video, text)

    def options(model, video, ids, mask):
        return match_options(model, video, Caption(ids, mask))

    clips, sentences, logits, match = by_flax(folder, scores, *tokens(folder, SENTENCES))
    model = vlmae.load(str(folder))
    assert_close(model.embed_video(random_clips()), clips)
    assert_close(model.embed_text(SENTENCES), sentences)
    assert_close(model.similarity(random_clips(), SENTENCES), clips @ sentences.T)
    assert_close(model.logits(random_clips(), SENTENCES), logits)
    assert_close(model.match(random_clips(), SENTENCES), match)

    flat = tokens(folder, [text for given in OPTIONS for text in given])
    expected = by_flax(folder, options, *(x.reshape(3, 2, 8) for x in flat))
    choice = model.choose(random_clips(), OPTIONS)
    assert_close(choice.scores, expected)
    np.testing.assert_array_equal(choice.index, expected.argmax(axis=1))
    ragged = model.choose(random_clips(), [OPTIONS[0], OPTIONS[1][:1], OPTIONS[2]])
    assert ragged.index[1] == 0 and ragged.scores[1, 1] == -np.inf
    assert_close(ragged.scores[[0, 2]], expected[[0, 2]])


def test_logits_of_a_sigmoid_loss_have_its_bias(workdir):
    model = vlmae.load(workdir("sigmoid"))
    bias, temperature = (model.params[name] for name in ("logit_bias", "temperature"))
    assert abs(bias) > 0.01
    expected = model.similarity(random_clips(), SENTENCES) / temperature + bias
    assert_close(model.logits(random_clips(), SENTENCES), expected)


@pytest.mark.parametrize("name", ["classifier", "decoder"])
def test_answers(workdir, name):
    folder = workdir(name)
    answers = Caption(*load_tokenizer(folder / "tokenizer").encode(NAMES, 5))

    def score(model, video, ids, mask, answer_ids, answer_mask):
        text = model.encode_text(ids, mask)
        if name == "classifier":
            return model.classify(model.fuse(video, text))
        return rank_answers(model, video, text, Caption(answer_ids, answer_mask), 3)

    expected = by_flax(folder, score, *tokens(folder, SENTENCES), *answers)
    found = vlmae.load(folder).answer(random_clips(), SENTENCES)
    assert_close(found.scores, expected)
    assert found.names == tuple(NAMES)
    assert found.best == tuple(NAMES[i] for i in expected.argmax(axis=1))


def test_choices_by_their_own_head(workdir):
    folder = workdir("choices")
    config, model = load_run(folder).objectives, vlmae.load(folder)

    def score(model, video, ids, mask):
        return choice_logits(model, video, Caption(ids, mask), config)

    flat = tokens(folder, [text for given in OPTIONS for text in given])
    expected = by_flax(folder, score, *(x.reshape(3, 2, 8) for x in flat))
    assert_close(model.choose(random_clips(), OPTIONS).scores, expected)
    with pytest.raises(UserError, match="the run chooses among 2 options, not 3"):
        model.choose(random_clips(), [["w5", "w6", "w7"]] * 3)
    with pytest.raises(UserError, match=r"'choices' cannot match: .* without objectives\.vtm"):
        model.match(random_clips(), SENTENCES)


def test_paths_are_read_as_in_evaluation(workdir, tmp_path):
    """Videos and images mixed, in the order given; arrays of another size are cropped."""
    model = vlmae.load(workdir("pretrained"))
    frames = np.random.default_rng(5).integers(0, 256, (FRAMES, 4, 6, 3), np.uint8)
    frames = frames.repeat(8, axis=1).repeat(8, axis=2)
    (tmp_path / "a.mp4").write_bytes(encode_video(frames, fps=4))
    Image.fromarray(frames[0]).save(tmp_path / "b.png")
    found = model.embed_video([tmp_path / "b.png", str(tmp_path / "a.mp4"), frames])
    image, cropped = eval_view(frames[:1], 16)[None], eval_view(frames, 16)[None]
    assert_close(found[[0]], model.embed_video(image))
    assert_close(found[[2]], model.embed_video(cropped))
    np.testing.assert_allclose(found[1], found[2], atol=0.05)  # H.264 is not lossless


def test_an_export_gives_what_its_run_gives(workdir, tmp_path):
    folder = workdir("pretrained")
    export_run(folder, tmp_path / "out")
    ours, exported = vlmae.load(folder), vlmae.load(tmp_path / "out")
    assert (exported.step, exported.config.model) == (7, ours.config.model)
    np.testing.assert_array_equal(exported.embed_text(SENTENCES), ours.embed_text(SENTENCES))


BAD_INPUT = {
    "no clip": (lambda m: m.embed_video([]), "video has no clip"),
    "one path": (lambda m: m.embed_video("a.mp4"), "list of paths"),
    "no file": (lambda m: m.embed_video(["/none/a.mp4"]), "/none/a.mp4: not a readable video"),
    "floats": (lambda m: m.embed_video(np.zeros((1, 2, 16, 16, 3))), "uint8 .* not float64"),
    "one sentence": (lambda m: m.embed_text("w5"), "texts must be a list"),
    "counts": (lambda m: m.match(random_clips(), ["w5"]), "3 clips, but 1 rows of texts"),
    "flat options": (lambda m: m.choose(random_clips(), SENTENCES), "list of lists"),
    "no option": (lambda m: m.choose(random_clips(), [["w5"], [], ["w6"]]), "clip 1 has no option"),
    "head": (lambda m: m.answer(random_clips(), SENTENCES), r"without objectives\.answer"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(workdir, name):
    call, message = BAD_INPUT[name]
    with pytest.raises(UserError, match=message):
        call(vlmae.load(workdir("pretrained")))


def test_importing_is_cheap():
    """Neither `import vlmae` nor `dir` imports JAX, nor does the list of commands."""
    assert dir(vlmae) == ["Model", "__version__", "load"]
    code = (
        "import sys, vlmae, vlmae.cli.main; dir(vlmae); vlmae.__version__;"
        "vlmae.cli.main.main(['--help']); print({'jax', 'numpy', 'flax'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        vlmae.other  # noqa: B018


# --- from the hub


@pytest.fixture
def hub(monkeypatch) -> list[dict]:
    """The hub without a network: its calls, answered by the folder that `answer` holds."""

    class Calls(list):
        answer = None

    calls = Calls()

    def download(name: str, **options):
        calls.append({"name": name, **options})
        if not calls.answer:
            raise OSError("Cannot reach the hub\nand more")
        return str(calls.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_an_export_on_the_hub(workdir, hub, tmp_path, monkeypatch):
    """Only the files that are fetched lie in the cache; their checksums are compared."""
    export_run(workdir("pretrained"), tmp_path / "export", "torch")
    cached = tmp_path / "cache" / "snapshot"
    cached.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    hub.answer = cached
    with pytest.raises(UserError, match="no run here"):
        vlmae.load("someone/shapes")
    [call] = hub
    assert call["name"] == "someone/shapes"
    for path in (tmp_path / "export").iterdir():
        if any(path.match(pattern) for pattern in call["allow_patterns"]):
            shutil.copy(path, cached)
    assert not [*cached.glob("*.py")] and (cached / "SHA256SUMS").is_file()
    ours, theirs = vlmae.load("someone/shapes"), vlmae.load(tmp_path / "export")
    assert_close(ours.embed_text(SENTENCES), theirs.embed_text(SENTENCES))
    weights = cached / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="is damaged"):
        vlmae.load("someone/shapes")


def test_local_folders_go_first(workdir, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "shapes").symlink_to(workdir("pretrained"))
    assert vlmae.load("someone/shapes").step == 7
    with pytest.raises(UserError, match="no run here"):
        vlmae.load("someone/shaped")  # a typing error beside it is not asked for
    for path in ("shapes", "./other/shapes", "/other/shapes", "a/b/c"):
        with pytest.raises(UserError, match="no run here"):
            vlmae.load(path)
    assert not hub


def test_neither_folder_nor_model(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = "nobody/shapes: no such folder, nor a model of the hub: Cannot reach the hub. "
    with pytest.raises(UserError, match=tried + "Give the folder .* or OWNER/NAME of") as error:
        vlmae.load("nobody/shapes")
    assert "\n" not in str(error.value)
