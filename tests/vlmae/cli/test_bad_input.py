"""Whatever a user can get wrong ends with one clear message that names it, and no traceback."""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_experiment

from data_pipelines.loading import rows
from data_pipelines.media.decode import DecodeError
from data_pipelines.schema.config import SourceConfig
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.records import DAMAGED
from data_pipelines.storage.stored import open_source
from vlmae.cli import experiment
from vlmae.cli.main import main as vlmae
from vlmae.cli.run_experiment import run_experiment, with_sources
from vlmae.config.tree import override
from vlmae.runs.checkpoint import load_params, shape_mismatches
from vlmae.runs.metric_writer import read_metrics
from vlmae.runs.owner import own
from vlmae.training.train_log import TooManyBadClips, check_bad_clips

# One objective compiles several times faster than all.
ONLY_VTC = ["--objectives.vtm", "0", "--objectives.mlm", "0", "--objectives.mvm", "0"]


def squeeze(text: str) -> str:
    """The words of a message without the frame that tyro draws around it."""
    return " ".join(word for word in text.split() if word.strip("╭╮╰╯─│"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.batch-size", "many"], "--data.batch-size: invalid literal for int()"),
        (["--model.dtype", "float16"], "invalid choice 'float16' for argument '--model.dtype'"),
        (["--model.width", "8"], "Unrecognized options: --model.width, 8"),
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.video.mask.ratio", "1.5"], "--model.video.mask.ratio must be"),
        (["--model.video.mask.ratio", "nan"], "--model.video.mask.ratio must be"),
        (["--data.train.0.num-frames", "0"], "--data.train.0.num-frames must be"),
        (["--model.video.num-heads", "3"], "--model.video.num-heads=3"),
        (["--seed", str(2**70)], "--seed must be"),
        (["--process-id", "1"], "--coordinator"),
    ],
)
def test_flag_out_of_range(run_tiny, flags, message):
    code, err, workdir = run_tiny(*flags)
    assert code == 1
    assert one_line(err).startswith(message)
    assert not workdir.exists()


def one_line(err: str) -> str:
    """The message, after checking that it is one line and that nothing else was printed."""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--data.train.0.name", "mine", "--data.data-dir", "/nowhere/at/all"],
            "data set 'mine' is not prepared in /nowhere/at/all; run: "
            "vlmae prepare mine --data-dir /nowhere/at/all",
        ),
        (["--data.train.0.split", "training"], "split 'training' is unknown or empty"),
        (["--data.tokenizer", "/nowhere/vocab.txt"], "/nowhere/vocab.txt"),
        (
            ["--model.text.vocab-size", "7"],
            "--model.text.vocab-size=7",
        ),
        (["--train.init-from", "/nowhere/run"], "/nowhere/run holds no checkpoints"),
        (["--mesh.data", "3"], "mesh data=3 x fsdp=1 x tensor=1 does not fit 1 device(s)"),
    ],
)
def test_bad_surroundings(run_tiny, flags, message):
    code, err, _ = run_tiny(*flags)
    assert code == 1
    assert message in one_line(err)


def test_a_misspelled_data_set_shows_before_another_is_generated(run_tiny, tmp_path):
    code, err, _ = run_tiny("--data.eval.name", "shape", "--data.data-dir", str(tmp_path / "data"))
    assert code == 1 and "data set 'shape' is not prepared" in one_line(err)
    assert not (tmp_path / "data").exists()


def test_evaluation_follows_the_training_data(tiny_config, tmp_path, capsys):
    """By default it is of the same data set; another one is used, and said."""
    for name in ("shapes", "twin"):
        shutil.copytree(Path(tiny_config.data.data_dir) / "shapes", tmp_path / name)
    own = override(tiny_config, {"data.eval.name": "", "data.data_dir": str(tmp_path)})
    config = with_sources(own)
    assert config.data.eval.name == "shapes" and not capsys.readouterr().out
    twin = dataclasses.replace(config.data.eval, name="twin")
    with_sources(override(config, {"data.eval": twin}))
    assert capsys.readouterr().out == "note: training on shapes, evaluation on twin\n"


def test_error_through_a_real_command_line(tmp_path, script_env):
    script = Path(tiny_experiment.__file__)
    flags = ["--data.train.0.name", "mine"]
    result = subprocess.run(
        [sys.executable, script, "--data.data-dir", str(tmp_path / "none"), *flags],
        capture_output=True,
        text=True,
        env=script_env,
        timeout=300,
    )
    assert result.returncode == 1
    assert result.stdout.startswith("devices: ") and result.stdout.count("\n") == 1
    assert "vlmae prepare mine" in one_line(result.stderr)


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


def test_a_directory_in_use_is_refused(run_tiny, tmp_path):
    """The same command twice: the second leaves nothing in the directory of the first."""
    workdir = tmp_path / "run"
    with own(workdir):
        before = sorted(workdir.rglob("*"))
        code, err, _ = run_tiny(*ONLY_VTC, workdir=workdir)
        assert code == 1
        message = rf"{workdir} is in use by process {os.getpid()} on {socket.gethostname()} \(.*"
        assert re.fullmatch(message, one_line(err))
        assert sorted(workdir.rglob("*")) == before


def test_a_run_does_not_go_on_with_other_data(run_tiny, finished_run, tmp_path):
    """The same split of the same size, but with clips of another seed, prepared elsewhere."""
    sizes = {"num_train": 48, "num_val": 8, "num_test": 12, "frame_size": 32}
    prepare("shapes", tmp_path / "other", seed=1, **sizes)
    flags = ["--data.data-dir", str(tmp_path / "other"), "--train.steps", "10"]
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    code, err, _ = run_tiny(*flags, workdir=workdir)
    assert code == 1 and "Traceback" not in err
    message = err.splitlines()[-1]
    assert f"{workdir} was trained so far on other data" in message
    assert "shapes/train: digest " in message and "shapes/test: digest " in message
    own = str(workdir / "tokenizer")
    assert message.endswith(
        f"remove {workdir}/data.json and give --data.tokenizer={own}, its own vocabulary"
    )
    before = files_of(workdir / "tokenizer")
    (workdir / "data.json").unlink()  # as the message says
    assert run_tiny(*flags, "--data.tokenizer", own, workdir=workdir)[0] == 0
    assert files_of(workdir / "tokenizer") == before


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_does_not_go_on_with_another_vocabulary(
    run_tiny, finished_run, tiny_data_dir, tmp_path
):
    """The same words in another order: each embedding would belong to another word."""
    data = shutil.copytree(tiny_data_dir, tmp_path / "data")
    [path] = (data / "shapes").rglob("vocab.txt")
    words = path.read_text().splitlines()
    path.write_text("\n".join([*words[:5], *words[:4:-1]]) + "\n")
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    before = files_of(workdir / "tokenizer")
    flags = ["--data.data-dir", str(data), "--train.steps", "10"]
    for note in (True, False):  # with the note of the run, and as a run of an older version
        if not note:
            (workdir / "data.json").unlink()
        code, err, _ = run_tiny(*flags, workdir=workdir)
        assert code == 1 and "(tokenizer: digest " in one_line(err)
        assert one_line(err).endswith(
            f"give --data.tokenizer={workdir}/tokenizer, its own vocabulary"
        )
        assert files_of(workdir / "tokenizer") == before


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
        ('"seed": 0', '"seed": "zero"', "--seed must be"),
        ('"dtype": "float32"', '"dtype": "float31"', "--model.dtype must be"),
        ('"ratio": 0.5', '"ratio": 1.5', "--model.video.mask.ratio must be"),
        ("{", "", "config.json: not JSON"),
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
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.fixture
def every_fourth_clip_is_bad(monkeypatch):
    """Decoding fails, as for files that were damaged after their data set was prepared."""
    sample_frames = rows.sample_frames

    def sample_or_fail(record: dict, *args):
        if int(record["source"].decode().rsplit("/", 1)[-1]) % 4 == 0:
            raise DecodeError("truncated")
        return sample_frames(record, *args)

    monkeypatch.setattr(rows, "sample_frames", sample_or_fail)


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


def test_damaged_records_are_bad_clips(run_tiny, tiny_data_dir, tmp_path):
    """Of a shard with a damaged part, each record is what was stored, or counts as a bad clip."""
    data = shutil.copytree(tiny_data_dir, tmp_path / "data")
    [path] = (data / "shapes").rglob("*-train.array_record*")
    content = bytearray(path.read_bytes())
    content[70_000:80_000] = bytes(10_000)
    path.write_bytes(content)
    records, good = (
        open_source(SourceConfig("shapes", "train"), folder) for folder in (data, tiny_data_dir)
    )
    found = [(records[i], good[i]) for i in range(48)]
    bad = [record for record, _ in found if record["media_type"] == DAMAGED]
    assert all(a == b for a, b in found if a["media_type"] != DAMAGED) and 0 < len(bad) < 24
    flags = [*ONLY_VTC, "--data.max-bad-ratio", "0.6"]
    code, _, workdir = run_tiny(*flags, "--data.data-dir", str(data))
    lines = read_metrics(workdir)
    shares = [line["data/bad_ratio"] for line in lines if "loss/total" in line]
    assert code == 0 and sum(shares) / 8 == pytest.approx(len(bad) / 48, abs=0.15)
    with pytest.raises(DecodeError, match="damaged record: Corrupted Riegeli/records file"):
        rows.load_video(bad[0], 1, None)
    path.unlink()
    code, err, _ = run_tiny(*flags, "--data.data-dir", str(data), workdir=tmp_path / "other")
    assert code == 1 and one_line(err) == f"{path}: no such file"


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


BAD_RUNS = {  # what a folder holds -> what the message names
    "nothing": ({}, "no run here"),
    "half a file": ({"config.json": "{"}, "config.json: not JSON"),
    "a binary file": ({"config.json": b"\xff\xfe\x00"}, "config.json: not UTF-8"),
    "a list": ({"config.json": "[]"}, "config.json: the config must be an object"),
    "another field": ({"config.json": '{"seeds": 1}'}, "config.json: unknown field seeds"),
    "an infinite number": (
        {"config.json": '{"optim": {"clip_norm": Infinity}}'},
        "--optim.clip-norm must be finite",
    ),
    "no checkpoint": ({"config.json": "{}"}, "holds no checkpoints"),
}


@pytest.mark.parametrize(("files", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_folder_that_is_no_run(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as end:
        vlmae(["evaluate", str(tmp_path)])
    assert message in end.value.code and str(tmp_path) in end.value.code
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code


def test_a_clip_that_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"error: .*none\.mp4: no such file"):
        vlmae(["explain", str(tmp_path), str(tmp_path / "none.mp4"), "a dog"])


DAMAGED_FILES = {  # a file of a run -> its content
    "result.json": '{"step": 1}',
    "metrics.jsonl": '{"loss/total": 1.0}\n',
    "config.json": "[" * 100_000,
    "processes/0.json": '{"process": "first"}',
    "job.json": "",
}


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_damaged_file_of_one_run(tmp_path, capsys, command, name):
    """The other runs are shown all the same, and the damaged one with the file."""
    for run in ("good", "bad"):
        (tmp_path / run / "processes").mkdir(parents=True)
        (tmp_path / run / "config.json").write_text("{}")
    (tmp_path / "bad" / name).write_text(DAMAGED_FILES[name])
    with pytest.raises(SystemExit) as end:
        vlmae([command, str(tmp_path)])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    if command == "report":
        shown += (tmp_path / "report.md").read_text()
    if command == "status" or ("/" not in name and name != "job.json"):  # a report reads neither
        assert "1 damaged" in shown and str(tmp_path / "bad" / name) in shown
    assert "2 runs: " in shown and "good" in shown


def test_resume_step(run_tiny, finished_run, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    code, err, _ = run_tiny("--resume-step", "5", workdir=workdir)
    folder = workdir / "checkpoints"
    assert code == 1 and one_line(err) == f"{folder} holds no checkpoint of step 5, but of [4, 8]"
    for flags in (["--launch", "local"], ["--find-num-workers"]):
        code, err, _ = run_tiny("--resume-step", "4", *flags, workdir=workdir)
        assert code == 1 and "--resume-step" in one_line(err)


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"model": {"type": "WordPiece"}}'])
def test_a_file_that_is_no_tokenizer(run_tiny, tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    code, err, workdir = run_tiny("--data.tokenizer", str(path))
    assert code == 1
    assert str(path) in one_line(err)
    assert not workdir.exists()


def test_an_error_of_ours_keeps_its_traceback(run_tiny, monkeypatch):
    """A wrong shape is a ValueError too, but no user can mend it."""
    monkeypatch.setattr(experiment, "run_experiment", lambda *_: np.ones(2) + np.ones(3))
    with pytest.raises(ValueError, match="broadcast"):
        run_tiny()
