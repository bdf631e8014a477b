"""A run that is stopped or killed and started again ends like one that never was, bit for bit."""

import dataclasses
import errno
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_experiment
from helpers import SMALL
from killed_runs import newest
from run_checks import (
    Stopped,
    assert_same_run,
    before_metrics_of,
    by_name,
    flat_params,
    history,
    stop,
)

from data_pipelines.schema.checks import MissingError, UserError
from vlmae.cli import run_experiment as run_module
from vlmae.cli.run_experiment import run_experiment
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.model import VitLayout
from vlmae.config.tree import override
from vlmae.parallel.exit_codes import Preempted
from vlmae.parallel.sharding import make_mesh
from vlmae.runs.checkpoint import Checkpoints, load_params
from vlmae.runs.heartbeat import read_beats
from vlmae.runs.metric_writer import read_metrics
from vlmae.runs.result import read_result
from vlmae.training import optim
from vlmae.training.step import make_init
from vlmae.training.train import start_state


def with_train(config: ExperimentConfig, **changes) -> ExperimentConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def with_workers(config: ExperimentConfig, num_workers: int) -> ExperimentConfig:
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, num_workers=num_workers)
    )


@pytest.fixture(scope="module")
def unbroken(tiny_data_dir, tmp_path_factory) -> Path:
    """The tiny experiment, 8 steps at one go; evaluated after steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("unbroken")
    config = tiny_experiment.get_config()
    data = dataclasses.replace(config.data, data_dir=str(tiny_data_dir))
    config = with_train(dataclasses.replace(config, data=data), eval_every_steps=4)
    run_experiment(config, workdir)
    return workdir


def test_history_of_an_unbroken_run(unbroken):
    """Each step's line of losses stands there once, and so does each evaluation."""
    lines = history(unbroken)
    assert [line["step"] for line in lines if "loss/total" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "retrieval/t2v_r1" in line] == [4, 8]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_stopped_run_continues(tiny_config, tmp_path, unbroken, monkeypatch, num_workers):
    """Stopped in step 7, after the checkpoint of step 4; continued with other workers."""
    config = with_train(tiny_config, eval_every_steps=4)
    with monkeypatch.context() as patch:
        before_metrics_of(7, stop, patch)
        with pytest.raises(Stopped):
            run_experiment(config, tmp_path)
    assert [line["step"] for line in history(tmp_path)] == [1, 2, 3, 4, 4, 5, 6]
    run_experiment(with_workers(config, num_workers), tmp_path)
    assert_same_run(tmp_path, unbroken)


@pytest.mark.timeout(300)
def test_told_to_end(tiny_config, tmp_path, unbroken, monkeypatch):
    """The step that comes next is saved, and the exit code asks for another start."""
    config = with_train(tiny_config, eval_every_steps=4, save_every_steps=100)
    for number, step in ((signal.SIGTERM, 2), (signal.SIGUSR1, 5)):
        with monkeypatch.context() as patch:
            before_metrics_of(step, functools.partial(signal.raise_signal, number), patch)
            with pytest.raises(Preempted) as ended:
                run_experiment(config, tmp_path)
        assert ended.value.code == 75
        assert newest(tmp_path) == step + 1
        assert read_beats(tmp_path)[0].ended == "preempted"
    run_experiment(config, tmp_path)
    assert_same_run(tmp_path, unbroken)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_in_an_evaluation(tiny_config, tmp_path, unbroken, monkeypatch, number):
    """In that of step 4, and in the final one: no further batch, and nothing is done twice."""
    config = with_train(tiny_config, eval_every_steps=4, save_every_steps=100)
    for step, evaluations in ((4, 1), (8, 2)):  # the second start begins with the missing one
        with monkeypatch.context() as patch:
            calls = signal_in_evaluation(number, evaluations, patch)
            with pytest.raises(SystemExit) as ended:
                run_experiment(config, tmp_path)
        assert ended.value.code == (130 if number == signal.SIGINT else 75)
        assert calls[-1] == 2  # and no further batch
        assert newest(tmp_path) == step and not (tmp_path / "result.json").exists()
        evaluated = [line["step"] for line in history(tmp_path) if "retrieval/t2v_r1" in line]
        assert evaluated == [4] * (evaluations - 1)
    run_experiment(config, tmp_path)
    assert_same_run(tmp_path, unbroken)


def signal_in_evaluation(number: int, evaluation: int, monkeypatch) -> list[int]:
    """Send a signal in the second batch of an evaluation; the result lists the batches seen."""
    evaluate, starts, calls = run_module.evaluate, itertools.count(1), []

    def told(config, params, mesh, data, out_dir, on_progress):
        last, batches = next(starts) == evaluation, itertools.count(1)

        def progress(together=False):
            calls.append(next(batches))
            if last and calls[-1] == 2:
                signal.raise_signal(number)
            on_progress(together)

        return evaluate(config, params, mesh, data, out_dir, progress)

    monkeypatch.setattr(run_module, "evaluate", told)
    return calls


def test_finished_run_is_only_evaluated_again(tiny_config, tmp_path, unbroken):
    """Neither parameters nor history change."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    result = run_experiment(with_train(tiny_config, eval_every_steps=4), tmp_path)
    name = "metrics.jsonl"
    assert (tmp_path / name).read_text() == (unbroken / name).read_text()
    assert_same_run(tmp_path, unbroken)
    assert read_metrics(tmp_path)[-1] == {"step": 8, **result}


def flip_newest(workdir: Path) -> Path:
    """Flips a bit of the arrays of the newest checkpoint."""
    files = [path for path in (workdir / f"checkpoints/{newest(workdir)}").rglob("*")]
    path = max(filter(Path.is_file, files), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return path


@pytest.mark.timeout(300)
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    tiny_config, tmp_path, unbroken, capsys
):
    """Step 8 cannot be trusted, so steps 5 to 8 are done again, and end as before."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    path = flip_newest(tmp_path)
    run_experiment(with_train(tiny_config, eval_every_steps=4), tmp_path)
    out = capsys.readouterr().out
    assert f"step 8 cannot be restored: {path} is damaged" in out and "from step 4" in out
    assert_same_run(tmp_path, unbroken)


@pytest.mark.timeout(300)
def test_going_back_to_a_step(tiny_config, tmp_path, unbroken, monkeypatch):
    """Until it has come to its end again, the run does not count as complete."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    config = with_train(tiny_config, eval_every_steps=4)
    assert read_result(tmp_path)
    with monkeypatch.context() as patch:
        before_metrics_of(6, stop, patch)
        with pytest.raises(Stopped):
            run_experiment(config, tmp_path, resume_step=4)
    assert newest(tmp_path) == 4 and read_result(tmp_path) is None
    assert (tmp_path / "set_aside" / "8").is_dir()
    run_experiment(config, tmp_path)
    assert_same_run(tmp_path, unbroken)


def test_init_from_takes_only_parameters(tiny_config, tmp_path, unbroken):
    """Step and optimizer start anew; what does not fit keeps its initial values and is named."""
    text = dataclasses.replace(tiny_config.model.text, vocab_size=166, cls_id=2, mask_id=4)
    model = dataclasses.replace(tiny_config.model, embed_dim=4, text=text)
    config = with_train(dataclasses.replace(tiny_config, model=model), init_from=str(unbroken))
    with Checkpoints(tmp_path) as checkpoints:
        mesh = make_mesh(config.mesh)
        state, report = start_state(config, mesh, checkpoints)
        fresh, nothing = start_state(with_train(config, init_from=""), mesh, checkpoints)
    assert int(state.step) == 0 and all(not x.any() for x in jax.tree.leaves(state.opt_state))
    assert f"from step 8 of {unbroken}: loaded " in report and not nothing
    left_out = "left out, of another shape: text_projection/dense/bias: (8,) in the source, (4,) in"
    assert left_out in report
    assert "missing" not in report and "unused" not in report
    source, initial, loaded = flat_params(unbroken), by_name(fresh.params), by_name(state.params)
    for name, values in loaded.items():
        expected = initial if "_projection/" in name else source
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_a_checkpoint_whose_optimizer_trained_other_parameters(tmp_path, monkeypatch):
    """As that of 0.1.0, where attention biases of frozen blocks learned: one line says what to do.

    Its parameters can be read, by evaluation as well as by the run that it advises.
    """
    changes = {
        "model.video.depth": 2,
        "model.video.positions": "none",
        "model.video.layout": VitLayout(relative_bias="layer", frame_cls="mean"),
        "model.video.adapter.frozen_blocks": 1,
        "model.video.adapter.width": 8,
    }
    config, is_frozen = override(SMALL, changes), optim.is_frozen
    with monkeypatch.context() as patch:
        patch.setattr(
            optim, "is_frozen", lambda name, m: "bias/" not in name and is_frozen(name, m)
        )
        shapes = jax.eval_shape(make_init(config), 0)
    state = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        checkpoints.manager.wait_until_finished()
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        with pytest.raises(UserError, match="its optimizer trained other parameters") as error:
            start_state(config, mesh, checkpoints)
    assert "\n" not in str(error.value)
    assert f"a new work directory with --train.init-from={tmp_path}," in str(error.value)
    params, step = load_params(tmp_path)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_a_work_directory_that_vanishes_is_not_made_anew(tiny_config, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    config = with_train(tiny_config, log_every_steps=2, save_every_steps=3)
    with monkeypatch.context() as patch:
        before_metrics_of(2, functools.partial(shutil.rmtree, workdir), patch)
        with pytest.raises(MissingError, match=r"run has vanished while .*\) *; the same") as error:
            run_experiment(config, workdir)
    assert "\n" not in str(error.value) and not workdir.exists()


def test_a_work_directory_that_vanishes_before_a_save(tiny_config, tmp_path, monkeypatch):
    """No file is written between the removal and the save, by which Orbax would make it anew."""
    workdir, save = tmp_path / "run", Checkpoints.save

    def save_and_remove(self, step, state):
        save(self, step, state)
        self.manager.wait_until_finished()
        shutil.rmtree(workdir)

    monkeypatch.setattr(Checkpoints, "save", save_and_remove)
    config = with_train(tiny_config, log_every_steps=8, save_every_steps=1)
    with pytest.raises(MissingError, match="has vanished"):
        run_experiment(config, workdir)
    assert not workdir.exists()


def test_checkpoints_without_a_config_are_refused(tiny_config, tmp_path):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds checkpoints, but no config\.json"):
        run_experiment(tiny_config, tmp_path)


@pytest.mark.timeout(300)
def test_a_full_disk_is_one_line(tiny_config, tmp_path, unbroken, monkeypatch):
    """Whatever a library makes of it; the same command then ends like an unbroken run."""
    config = with_train(tiny_config, eval_every_steps=4)

    def fail():
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("a background thread has failed") from error

    with monkeypatch.context() as patch:
        before_metrics_of(6, fail, patch)
        with pytest.raises(UserError, match="cannot be written: No space left on dev") as error:
            run_experiment(config, tmp_path)
    assert "\n" not in str(error.value)
    run_experiment(config, tmp_path)
    assert_same_run(tmp_path, unbroken)


def running(pid: int) -> bool:
    """True if a process is there and not merely waiting to be counted as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.timeout(120)
def test_batches_that_are_left_at_the_end_are_freed_in_silence(tiny_data_dir, script_env):
    """Python warns of them as leaked objects, at the end of a good run."""
    code = """
import sys
from multiprocessing.shared_memory import SharedMemory
from data_pipelines.schema.config import DataConfig
from data_pipelines.loading.pipeline import train_batches

config = DataConfig(data_dir=sys.argv[1], image_size=16, batch_size=8, num_workers=1)
with train_batches(config, 0, seed=0) as batches:
    next(batches)
    print(SharedMemory(create=True, size=8).name)
"""
    command = [sys.executable, "-c", code, str(tiny_data_dir)]
    done = subprocess.run(command, env=script_env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(FileNotFoundError):
        SharedMemory(done.stdout.strip())


@pytest.mark.timeout(120)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_workers_end_with_a_killed_run(tiny_data_dir, script_env):
    """A worker that outlives the training process would hold its memory forever."""
    code = """
import multiprocessing, sys, time
from data_pipelines.schema.config import DataConfig
from data_pipelines.loading.pipeline import train_batches

config = DataConfig(data_dir=sys.argv[1], image_size=16, batch_size=8, num_workers=1)
batches = train_batches(config, 0, seed=0)
next(batches)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
time.sleep(100)
"""
    command = [sys.executable, "-c", code, str(tiny_data_dir)]
    process = subprocess.Popen(command, env=script_env, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert workers and all(running(pid) for pid in workers)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(pid) for pid in workers)
