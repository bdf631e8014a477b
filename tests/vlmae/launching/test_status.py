"""Status: hand-made work directories in every state, and a run that is really killed."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_experiment

from vlmae.config.tree import override
from vlmae.launching.job_record import JobRecord, write_job
from vlmae.launching.status import (
    RunStatus,
    find_statuses,
    format_secs,
    format_table,
    run_status,
    status,
)
from vlmae.runs.heartbeat import Beat
from vlmae.runs.result import write_result
from vlmae.runs.workdir import write_run_metadata

NOW = 1_000_000.0
NO_PID = 2**22 + 1  # above the largest that Linux gives
LINE = {"step": 4, "loss/total": 2.5, "speed/clips_per_sec": 16.0, "speed/secs_per_step": 0.5}


def beat(workdir: Path, **changes) -> None:
    """A sign of life, 2 s old, of a process that this host does not have."""
    values = {
        **{"process": 0, "processes": 1, "host": socket.gethostname(), "pid": NO_PID, "job": ""},
        **{"step": 5, "phase": "training", "phase_since": NOW - 60, "written": NOW - 2},
        **{"period_secs": 5.0, "ended": ""},
    }
    fields = dataclasses.asdict(Beat(**values | changes))
    folder = workdir / "processes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{fields['process']}.json").write_text(json.dumps(fields))


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A run at step 4 of 8."""
    folder = tmp_path / "run"
    write_run_metadata(tiny_experiment.get_config(), folder)
    (folder / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    return folder


def record(workdir: Path, job: str = "12_3", executor: str = "slurm") -> None:
    write_job(workdir, JobRecord(executor, job, socket.gethostname(), "LOG", (), NOW - 100))


def test_running(workdir):
    beat(workdir)
    run = run_status(workdir, NOW)
    assert run == RunStatus("run", "running", "training for 1 min 0 s", 5, 8, run.metrics, 2.0)
    assert run.metrics["loss/total"] == 2.5 and run.secs_left == 1.5


def test_complete(workdir):
    beat(workdir, ended="complete")
    write_result(workdir, 8, {"retrieval/t2v_r1": 12.5}, 8)
    run = run_status(workdir, NOW)
    assert (run.state, run.detail, run.step) == ("complete", "", 8)
    assert run.metrics["retrieval/t2v_r1"] == 12.5 and math.isnan(run.secs_left)


def test_the_result_of_another_config_does_not_count(workdir):
    write_result(workdir, 8, {}, 8)
    write_run_metadata(override(tiny_experiment.get_config(), {"train.steps": 9}), workdir)
    beat(workdir)
    assert run_status(workdir, NOW).state == "running"


def test_failed(workdir):
    beat(workdir, ended="failed")
    (workdir / "error.txt").write_text("Traceback\nValueError: no luck\n\n")
    run = run_status(workdir, NOW)
    assert (run.state, run.detail, run.step) == ("failed", "ValueError: no luck", 4)
    (workdir / "error.txt").unlink()
    assert run_status(workdir, NOW).state == "failed"


@pytest.mark.parametrize(
    ("pid", "state"), [(NO_PID, "failed"), (os.getpid(), "running")], ids=["gone", "alive"]
)
def test_killed_a_moment_ago(workdir, pid, state):
    """What watched over it has left a word; but of several processes, others may still live."""
    beat(workdir, pid=pid)
    (workdir / "error.txt").write_text("killed by SIGKILL\n")
    assert run_status(workdir, NOW).state == state


def test_refused_before_it_had_a_config(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "error.txt").write_text("ValueError: mask.ratio must be in [0, 1)\n")
    run = run_status(tmp_path / "run", NOW)
    assert (run.state, run.detail) == ("failed", "ValueError: mask.ratio must be in [0, 1)")


@pytest.mark.parametrize(
    ("queue", "state", "detail"),
    [
        ({"12_3": "PENDING"}, "preempted", "job 12_3: PENDING"),
        ({"12_2": "PENDING"}, "preempted", "no job waits to start it again"),
    ],
)
def test_preempted(workdir, queue, state, detail):
    beat(workdir, ended="preempted")
    record(workdir)
    run = run_status(workdir, NOW, queue)
    assert (run.state, run.detail) == (state, detail)


@pytest.mark.parametrize(
    ("queue", "state", "detail"),
    [
        ({"12_3": "PENDING"}, "queued", "job 12_3: PENDING"),
        ({"12_3": "RUNNING"}, "running", "starting"),
        ({}, "not started", "job 12_3 is gone, see LOG"),
        (None, "not started", "job 12_3: SLURM cannot be asked"),
    ],
)
def test_launched_but_not_begun(tmp_path, queue, state, detail):
    record(tmp_path / "run")
    run = run_status(tmp_path / "run", NOW, queue)
    assert (run.state, run.detail, run.steps) == (state, detail, 0)


def test_launched_again_after_a_failure(workdir):
    (workdir / "error.txt").write_text("ValueError: no luck\n")
    record(workdir)
    assert run_status(workdir, NOW, {"12_3": "PENDING"}).state == "queued"


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"written": NOW - 14}, "running"),  # not silent for three periods yet
        ({"written": NOW - 16}, "lost"),
        ({"written": NOW - 16, "pid": os.getpid()}, "running"),  # suspended, perhaps
        ({"written": NOW - 16, "pid": os.getpid(), "host": "elsewhere"}, "lost"),
        ({"written": NOW - 16, "ended": "complete"}, "failed"),  # without a result
    ],
)
def test_silent(workdir, changes, state):
    beat(workdir, **changes)
    assert run_status(workdir, NOW).state == state


def test_what_is_said_of_a_lost_run(workdir):
    beat(workdir, written=NOW - 100, host="node7", pid=9, phase="saving")
    run = run_status(workdir, NOW)
    where = "process 0 of 1 (node7, pid 9): saving, step 5, for 60 s; no sign of life for 100 s"
    assert (run.state, run.detail, run.silent_secs) == ("lost", where, 100.0)
    assert run.step == 4  # what is on record


def test_a_run_that_is_really_killed(workdir):
    code = "import time; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        beat(workdir, pid=process.pid, written=NOW - 16)
        assert run_status(workdir, NOW).state == "running"
        process.kill()
    assert run_status(workdir, NOW).state == "lost"


def test_one_of_two_processes_is_gone(workdir):
    beat(workdir, processes=2)
    beat(workdir, process=1, processes=2, host="node2", written=NOW - 60)
    run = run_status(workdir, NOW)
    assert run.state == "running" and run.detail.endswith("; process 1 on node2 is lost")
    # Continued on one host: what the second process left is history.
    beat(workdir)
    assert run_status(workdir, NOW).detail == "training for 1 min 0 s"


def test_a_local_job_that_starts(tmp_path):
    pretends = "import time; print(flush=True); time.sleep(60)  # submitit"
    with subprocess.Popen([sys.executable, "-c", pretends], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        record(tmp_path / "run", str(process.pid), "local")
        assert run_status(tmp_path / "run", NOW, {}).detail == "starting"
        process.kill()
    assert run_status(tmp_path / "run", NOW, {}).state == "not started"


def test_a_config_without_a_sign_of_life(workdir):
    assert run_status(workdir, NOW).state == "lost"


def test_the_table(workdir, tmp_path):
    beat(workdir)
    record(tmp_path / "sweep" / "seed=1", "77", "local")
    (tmp_path / "jobs").mkdir()
    (workdir / "checkpoints").mkdir()
    (workdir / "checkpoints" / "config.json").write_text("{}")
    found = find_statuses(tmp_path, NOW)
    lines = format_table(found).splitlines()
    assert lines[0].split() == "run state step done clips/s left loss metric seen".split()
    assert lines[1].split() == (
        "run running 5/8 62 % 16.0 1 s 2.500 - 2 s training for 1 min 0 s".split()
    )
    assert lines[2].startswith("sweep/seed=1  not started  -")
    assert lines[3] == "2 runs: 1 running, 1 not started"


def test_nothing_to_see(tmp_path):
    with pytest.raises(ValueError, match=r"no run .* in or below"):
        status(tmp_path)
    with pytest.raises(ValueError, match="no such directory"):
        status(tmp_path / "nowhere")


def test_without_a_queue_to_ask(tmp_path, monkeypatch, capsys):
    record(tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path))
    status(tmp_path)
    out, err = capsys.readouterr()
    assert "not started" in out and err.startswith("note: there is no squeue here")


def test_durations():
    secs = (7.2, 95.0, 7384.0, 200000.0, math.nan, -1.0)
    expected = ["7 s", "1 min 35 s", "2 h 3 min", "2 d 7 h", "-", "0 s"]
    assert [format_secs(s) for s in secs] == expected
