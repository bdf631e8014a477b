"""A run that is stopped or killed and started again ends like one that never was, bit for bit."""

import dataclasses
import functools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_experiment
from jaxtyping import PyTree

from vlmae.checkpoint import Checkpoints, load_params
from vlmae.cli import run_experiment
from vlmae.config import ExperimentConfig
from vlmae.heartbeat import read_beats
from vlmae.metric_writer import read_metrics
from vlmae.preemption import Preempted
from vlmae.sharding import make_mesh, path_name
from vlmae.train import start_state

SPEEDS = ("secs_per_step", "clips_per_sec", "data_wait_share", "matrix_rate_share")
TIMES = tuple(f"speed/{name}" for name in SPEEDS)
NEVER_EQUAL = (*TIMES, "memory/peak_bytes")


class Stopped(Exception):
    """What a test raises to end a run between two steps."""


def flat_params(workdir: Path) -> dict[str, np.ndarray]:
    """The parameters of a run's last checkpoint, by name."""
    return by_name(load_params(workdir)[0])


def by_name(params: PyTree) -> dict[str, np.ndarray]:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def history(workdir: Path) -> list[dict]:
    """All lines of metrics, without those about time and memory."""
    lines = read_metrics(workdir)
    return [{k: v for k, v in line.items() if k not in NEVER_EQUAL} for line in lines]


def assert_same_run(workdir: Path, unbroken: Path) -> None:
    """Parameters and the history of metrics are equal, bit for bit."""
    ours, theirs = flat_params(workdir), flat_params(unbroken)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert not different
    assert history(workdir) == history(unbroken)


def with_train(config: ExperimentConfig, **changes) -> ExperimentConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def with_workers(config: ExperimentConfig, num_workers: int) -> ExperimentConfig:
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, num_workers=num_workers)
    )


def before_metrics_of(step: int, act: Callable[[], None], monkeypatch) -> None:
    """Does something when the metrics of `step` are to be written."""
    from vlmae.metric_writer import MetricWriter

    write = MetricWriter.write

    def act_and_write(self, written_step: int, metrics: dict) -> None:
        if written_step == step:
            act()
        write(self, written_step, metrics)

    monkeypatch.setattr(MetricWriter, "write", act_and_write)


def stop() -> None:
    raise Stopped


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


def test_finished_run_is_only_evaluated_again(tiny_config, tmp_path, unbroken):
    """Neither parameters nor history change."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    result = run_experiment(with_train(tiny_config, eval_every_steps=4), tmp_path)
    name = "metrics.jsonl"
    assert (tmp_path / name).read_text() == (unbroken / name).read_text()
    assert_same_run(tmp_path, unbroken)
    assert read_metrics(tmp_path)[-1] == {"step": 8, **result}


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
    assert "mismatched: text_projection/dense/kernel: (16, 8) in the source, (16, 4) in" in report
    assert "missing" not in report and "unused" not in report
    source, initial, loaded = flat_params(unbroken), by_name(fresh.params), by_name(state.params)
    for name, values in loaded.items():
        expected = initial if "_projection/" in name else source
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def saving(workdir: Path) -> bool:
    """Whether an unfinished checkpoint lies there: a save is under way."""
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def newest(workdir: Path) -> int:
    """Step of the newest whole checkpoint, 0 if there is none."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


class Killer:
    """Starts the tiny experiment with a save after every step, and kills it when told to."""

    def __init__(self, data_dir: Path, workdir: Path, env: dict[str, str], steps: int):
        flags = {
            "data.data-dir": data_dir,
            "workdir": workdir,
            "train.steps": steps,
            "train.save-every-steps": 1,
        }
        self.command = [sys.executable, tiny_experiment.__file__]
        self.command += [
            word for name, value in flags.items() for word in (f"--{name}", str(value))
        ]
        self.workdir, self.env = workdir, env

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def run(self) -> None:
        """Runs to the end."""
        process = self.start()
        err = process.communicate(timeout=200)[1]
        assert process.returncode == 0, err

    def run_until(self, moment: Callable[[], bool]) -> bool:
        """Kills the run with SIGKILL at the moment; returns False if the run ended before."""
        process = self.start()
        while process.poll() is None and not moment():
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        err = process.communicate(timeout=60)[1]
        assert process.returncode in (0, -signal.SIGKILL), err
        return process.returncode != 0


@pytest.fixture
def killer(tiny_data_dir, tmp_path, script_env) -> Callable[[str, int], Killer]:
    def make(name: str, steps: int) -> Killer:
        return Killer(tiny_data_dir, tmp_path / name, script_env, steps)

    return make


@pytest.mark.timeout(600)
def test_killed_in_a_save(killer):
    """One SIGKILL while a checkpoint is being written; the same command line goes on."""
    unbroken, killed = killer("unbroken", 8), killer("killed", 8)
    unbroken.run()
    assert killed.run_until(lambda: newest(killed.workdir) >= 2 and saving(killed.workdir))
    assert 2 <= newest(killed.workdir) < 8
    killed.run()
    assert_same_run(killed.workdir, unbroken.workdir)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_many_times(killer):
    """Twelve SIGKILLs: at random moments from the start of the process on, and within saves."""
    steps, rng = 40, random.Random(0)
    unbroken, killed = killer("unbroken", steps), killer("killed", steps)
    unbroken.run()
    kills = kills_in_saves = 0
    for kill in range(12):
        before, deadline = newest(killed.workdir), time.monotonic() + rng.uniform(0, 12)

        def in_a_save(before: int = before) -> bool:
            return newest(killed.workdir) > before and saving(killed.workdir)

        def at_random(deadline: float = deadline) -> bool:
            return time.monotonic() > deadline

        kills += killed.run_until(at_random if kill % 2 else in_a_save)
        kills_in_saves += saving(killed.workdir)
    assert kills >= 6 and kills_in_saves >= 3
    killed.run()
    assert_same_run(killed.workdir, unbroken.workdir)


def running(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be counted as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.timeout(120)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_workers_end_with_a_killed_run(tiny_data_dir, script_env):
    """A worker that outlives the training process would hold its memory forever."""
    code = """
import multiprocessing, sys, time
from data_pipelines.config import DataConfig
from data_pipelines.pipeline import train_batches

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
