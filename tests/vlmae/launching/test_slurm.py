"""Runs on a real SLURM of one node (see `slurm_node`): pytest -m slurm."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_experiment
from slurm_node import NoSlurm, slurm_node

from vlmae.launching.job_record import ask_queue, read_job
from vlmae.launching.status import run_status
from vlmae.runs.metric_writer import read_metrics
from vlmae.runs.result import read_result

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

# One objective compiles several times faster than all.
QUICK = ["--objectives.vtm", "0", "--objectives.mlm", "0", "--objectives.mvm", "0"]
QUICK += ["--train.steps", "3", "--train.save-every-steps", "1"]
LONG = ["--train.steps", "150", "--train.save-every-steps", "10"]


@pytest.fixture(scope="module")
def node_env(tmp_path_factory):
    """The environment in which a SLURM is found; skips where none can be had."""
    try:
        with slurm_node(tmp_path_factory.mktemp("slurm")) as env:
            yield env
    except NoSlurm as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def slurm_here(node_env, monkeypatch) -> None:
    """The commands of SLURM work in this process."""
    for name in ("SLURM_CONF", "PATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, node_env[name])


@pytest.fixture
def submit(slurm_here, script_env, tiny_data_dir, tmp_path) -> Callable[..., str]:
    """Submits the tiny experiment; its work directory is `run`. Returns what was printed."""

    def submit(*flags: str) -> str:
        where = ["--data.data-dir", str(tiny_data_dir), "--workdir", str(tmp_path / "run")]
        command = [sys.executable, tiny_experiment.__file__, *where, *QUICK, *flags]
        command += ["--launch", "slurm", "--partition", "tests"]
        done = subprocess.run(command, env=script_env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return submit


def state_of(workdir: Path) -> str:
    return run_status(workdir, time.time(), ask_queue([read_job(workdir)])).state


def wait_for(workdir: Path, *states: str, secs: float = 300) -> str:
    """The first of these states that the run is in; before it, it is in `queued` or `running`."""
    end, seen = time.monotonic() + secs, set()
    while (state := state_of(workdir)) not in states:
        seen.add(state)
        assert time.monotonic() < end, f"{workdir}: {seen}, {logs_of(workdir)}"
        time.sleep(1)
    return state


def logs_of(workdir: Path) -> str:
    """What the last job of a run printed."""
    out = Path(read_job(workdir).log)
    return "".join(p.read_text() for p in (out, out.with_suffix(".err")) if p.exists())


def steps_of(workdir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(workdir) if "loss/total" in line]


def test_a_single_run(submit, tmp_path):
    printed = submit()
    job = read_job(tmp_path / "run").job
    assert f"the run is job {job}: " in printed
    wait_for(tmp_path / "run", "complete")
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    assert "results, metrics and pictures are in" in logs_of(tmp_path / "run")


def test_a_sweep_as_an_array_with_a_limit(submit, tmp_path):
    """Its second run is refused, and alone is submitted again."""
    command = ["--sweep", "ratio", "--max-jobs", "1"]
    submit(*command)
    ratios = (0.25, 1.5, 0.5)
    workdirs = [tmp_path / "run" / f"mask.ratio={ratio}" for ratio in ratios]
    records = [read_job(workdir) for workdir in workdirs]
    jobs = [record.job for record in records]
    array = jobs[0].split("_")[0]
    assert jobs == [f"{array}_{i}" for i in range(3)]
    most = 0
    while queue := ask_queue(records):
        most = max(most, sum(state == "RUNNING" for state in queue.values()))
        time.sleep(0.5)
    assert most == 1
    states = [state_of(workdir) for workdir in workdirs]
    assert states == ["complete", "failed", "complete"], logs_of(workdirs[0])
    printed = submit(*command).splitlines()
    assert printed[0] == "sweep of 3 runs: 2 already complete"
    assert printed[1].startswith("run 1 of 0 ... 2 is job ") and len(printed) == 3
    assert [read_job(workdir).job for workdir in (workdirs[0], workdirs[2])] == jobs[::2]
    wait_for(workdirs[1], "failed")


def test_a_run_of_two_tasks(submit, tmp_path):
    submit("--tasks-per-node", "2")
    wait_for(tmp_path / "run", "complete")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["processes"] == 2 and steps_of(tmp_path / "run") == [1, 2, 3]
    beats = [json.loads(p.read_text()) for p in (tmp_path / "run" / "processes").glob("*.json")]
    assert {(beat["ended"], beat["job"]) for beat in beats} == {
        ("complete", read_job(tmp_path / "run").job)
    }


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_preempted_job_is_queued_again_and_goes_on(submit, tmp_path, tasks):
    workdir = tmp_path / "run"
    submit(*LONG, "--tasks-per-node", str(tasks))
    wait_for_steps(workdir, 20)
    assert "waits or runs already" in submit(*LONG)
    subprocess.run(["scancel", "--signal=USR1", read_job(workdir).job], check=True)
    assert wait_for(workdir, "preempted") == "preempted"
    wait_for(workdir, "complete")
    assert steps_of(workdir) == list(range(1, 151)) and read_result(workdir)["step"] == 150
    log = logs_of(workdir)
    assert log.count("is queued again") == 1 and log.count("continuing from step") == 1


def test_a_cancelled_job_saves_itself_and_is_not_queued_again(submit, tmp_path):
    workdir = tmp_path / "run"
    submit(*LONG)
    wait_for_steps(workdir, 20)
    subprocess.run(["scancel", read_job(workdir).job], check=True)
    wait_for(workdir, "preempted")
    while ask_queue([read_job(workdir)]):
        time.sleep(0.5)
    status = run_status(workdir, time.time(), {})
    assert (status.state, status.detail) == ("preempted", "no job waits to start it again")
    assert "was ended by SLURM, where it is C" in logs_of(workdir)
    submit(*LONG)
    wait_for(workdir, "complete")
    assert steps_of(workdir) == list(range(1, 151))


def wait_for_steps(workdir: Path, step: int, secs: float = 300) -> None:
    end = time.monotonic() + secs
    while len(steps_of(workdir)) < step:
        assert time.monotonic() < end, f"{state_of(workdir)}, {logs_of(workdir)}"
        time.sleep(0.5)
