"""Whatever a user can get wrong ends with one clear message that names it, and no traceback."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_experiment
from jaxtyping import PyTree

from data_pipelines import rows
from data_pipelines.decode import DecodeError
from vlmae.checkpoint import load_params, shape_mismatches
from vlmae.cli import run_experiment
from vlmae.metric_writer import read_metrics
from vlmae.train import TooManyBadClips, check_bad_clips

# One objective compiles several times faster than all.
ONLY_VTC = ["--objectives.vtm", "0", "--objectives.mlm", "0", "--objectives.mvm", "0"]


def squeeze(text: str) -> str:
    """The words of a message without the frame that tyro draws around it."""
    return " ".join(word for word in text.split() if word.strip("╭╮╰╯─│"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.video.mask.ratio", "1.5"], "mask.ratio must be in [0, 1), not 1.5"),
        (["--data.train.0.num-frames", "0"], "num_frames must be at least 1, not 0"),
        (["--data.batch-size", "many"], "--data.batch-size: invalid literal for int()"),
        (["--model.dtype", "float16"], "invalid choice 'float16' for argument '--model.dtype'"),
        (["--model.width", "8"], "Unrecognized options: --model.width, 8"),
        (["--model.video.num-heads", "3"], "num_heads=3 does not divide model.video.width=16"),
    ],
)
def test_bad_flag(run_tiny, flags, message):
    code, err, workdir = run_tiny(*flags)
    assert code == 2
    assert message in squeeze(err)
    assert not workdir.exists()


def test_near_miss_is_suggested(run_tiny):
    _, err, _ = run_tiny("--model.video.mask.ratoi", "0.5")
    assert "Perhaps you meant: --model.video.mask.ratio" in squeeze(err)


def one_line(err: str) -> str:
    """The message, after checking that it is one line and that nothing else was printed."""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [
                *["--data.train.0.name", "mine", "--data.eval.name", "mine"],
                *["--data.data-dir", "/nowhere/at/all"],
            ],
            "data set 'mine' is not prepared in /nowhere/at/all; run: "
            "python -m data_pipelines.prepare mine --data-dir /nowhere/at/all",
        ),
        (["--data.train.0.split", "training"], "split 'training' is unknown or empty"),
        (["--data.tokenizer", "/nowhere/vocab.txt"], "/nowhere/vocab.txt"),
        (
            ["--model.text.vocab-size", "7"],
            "model.text.vocab_size=7, but the tokenizer has",
        ),
        (["--train.init-from", "/nowhere/run"], "/nowhere/run holds no checkpoints"),
        (["--mesh.data", "3"], "mesh data=3 x fsdp=1 x tensor=1 does not fit 1 device(s)"),
    ],
)
def test_bad_surroundings(run_tiny, flags, message):
    code, err, _ = run_tiny(*flags)
    assert code == 1
    assert message in one_line(err)


def test_error_through_a_real_command_line(tmp_path, script_env):
    script = Path(tiny_experiment.__file__)
    flags = ["--data.train.0.name", "mine", "--data.eval.name", "mine"]
    result = subprocess.run(
        [sys.executable, script, "--data.data-dir", str(tmp_path / "none"), *flags],
        capture_output=True,
        text=True,
        env=script_env,
        timeout=300,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "python -m data_pipelines.prepare mine" in one_line(result.stderr)


def test_a_failed_start_does_not_claim_the_directory(run_tiny):
    code, _, workdir = run_tiny("--train.init-from", "/nowhere/run")
    assert code == 1
    assert not (workdir / "config.json").exists()
    assert "/nowhere/run holds no checkpoints" in (workdir / "error.txt").read_text()


@pytest.fixture(scope="module")
def finished_run(tiny_data_dir, tmp_path_factory) -> Path:
    """A work directory with checkpoints of steps 4 and 8; tests must leave it as it is."""
    workdir = tmp_path_factory.mktemp("finished")
    config = tiny_experiment.get_config()
    data = dataclasses.replace(config.data, data_dir=str(tiny_data_dir))
    run_experiment(dataclasses.replace(config, data=data), workdir)
    return workdir


def test_directory_of_another_config(run_tiny, finished_run):
    code, err, _ = run_tiny("--optim.b2", "0.95", "--model.embed-dim", "4", workdir=finished_run)
    assert code == 1
    assert f"{finished_run} belongs to another config" in err
    assert "optim.b2: 0.999 there, 0.95 here" in err
    assert "model.embed_dim: 8 there, 4 here" in err
    assert "seed" not in err


def test_checkpoint_of_another_shape(run_tiny, finished_run):
    """A directory whose config was changed by hand: the checkpoint itself is checked too."""
    path = finished_run / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"embed_dim": 8', '"embed_dim": 4'))
    try:
        code, err, _ = run_tiny("--model.embed-dim", "4", workdir=finished_run)
    finally:
        path.write_text(text)
    assert code == 1
    assert "params/text_projection/dense/kernel: (16, 8) in the checkpoint, (16, 4) in the" in err
    assert "Traceback" not in err


def test_start_beyond_the_last_step(run_tiny, finished_run):
    before = (finished_run / "config.json").read_text()
    code, err, _ = run_tiny("--train.steps", "6", workdir=finished_run)
    assert code == 1
    assert one_line(err) == "the checkpoint is at step 8, beyond train.steps=6"
    assert (finished_run / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"embed_dim"', '"embedding_dim"', "unknown field model.embedding_dim"),
        ('"seed": 0', '"seed": "zero"', "seed must be of type int, not 'zero'"),
        ('"dtype": "float32"', '"dtype": "float31"', "model.dtype='float31' is none of"),
        ('"ratio": 0.5', '"ratio": 1.5', "mask.ratio must be in [0, 1), not 1.5"),
        ("{", "", "config.json: Extra data"),
    ],
)
def test_bad_config_json(run_tiny, finished_run, tmp_path, old, new, message):
    text = (finished_run / "config.json").read_text()
    assert old in text
    (tmp_path / "config.json").write_text(text.replace(old, new, 1))
    code, err, _ = run_tiny(workdir=tmp_path)
    assert code == 1
    assert message in one_line(err)
    assert str(tmp_path / "config.json") in err


def all_finite(params: PyTree) -> bool:
    from jax import tree

    return all(np.isfinite(x).all() for x in tree.leaves(params))


@pytest.mark.parametrize(
    ("learning_rate", "weight_decay", "step", "named"),
    [
        ("1e15", "0", 3, ["loss/vtc=nan", "loss/total=nan", "optim/grad_norm=nan"]),
        ("1e38", "1e4", 2, ["optim/param_norm="]),  # the loss is finite, its own update is not
    ],
)
def test_what_is_not_finite_stops_the_run(run_tiny, learning_rate, weight_decay, step, named):
    """The step before, which was fine, is saved; the bad one is not."""
    code, err, workdir = run_tiny(
        *ONLY_VTC,
        *["--optim.learning-rate", learning_rate, "--optim.weight-decay", weight_decay],
        *["--optim.warmup-steps", "1", "--train.save-every-steps", "1"],
    )
    assert code == 1
    message = one_line(err)
    assert message.startswith(f"step {step}: not finite: ")
    assert all(name in message for name in named)
    assert ("loss/" in message) == ("loss/" in named[0])
    params, saved_step = load_params(workdir)
    assert saved_step == step - 1
    assert all_finite(params)


@pytest.fixture
def every_fourth_clip_is_bad(monkeypatch):
    """What decoding does with a file that was damaged after its data set was prepared."""
    load_video = rows.load_video

    def load_or_fail(record: dict, *args) -> np.ndarray:
        if int(record["source"].decode().rsplit("/", 1)[-1]) % 4 == 0:
            raise DecodeError("truncated")
        return load_video(record, *args)

    monkeypatch.setattr(rows, "load_video", load_or_fail)


@pytest.mark.parametrize(("max_bad_ratio", "stops"), [("0.1", True), ("0.5", False)])
def test_share_of_bad_clips(run_tiny, every_fourth_clip_is_bad, max_bad_ratio, stops):
    """Bad clips are counted in training and left out of the evaluation; too many stop the run."""
    code, err, workdir = run_tiny(*ONLY_VTC, "--data.max-bad-ratio", max_bad_ratio)
    lines = read_metrics(workdir)
    shares = [line["data/bad_ratio"] for line in lines if "loss/total" in line]
    if stops:
        assert code == 1
        assert "of 64 clips could not be decoded, more than data.max_bad_ratio=0.1" in err
        assert load_params(workdir)[1] == 4
    else:
        assert code == 0
        assert len(shares) == 8 and 0.1 < sum(shares) / 8 < 0.5
        assert lines[-1]["retrieval/bad_clips"] == 3 and lines[-1]["retrieval/num_clips"] == 9


def test_bad_clips_are_judged_once_enough_were_seen():
    """Neither the first unlucky batch of a long run nor the short rest of a continued one stops."""
    check_bad_clips(bad=8, seen=8, total=100_000, max_ratio=0.01)
    check_bad_clips(bad=1, seen=999, total=1000, max_ratio=0.0)
    with pytest.raises(TooManyBadClips, match="11 of 1000 clips"):
        check_bad_clips(bad=11, seen=1000, total=100_000, max_ratio=0.01)
    with pytest.raises(TooManyBadClips, match="1 of 8 clips"):
        check_bad_clips(bad=1, seen=8, total=8, max_ratio=0.01)


def test_a_scalar_of_one_side_only_is_not_called_absent_on_both():
    [line] = shape_mismatches({"step": ()}, {})
    assert line == "step: () in the checkpoint, absent in the model"
