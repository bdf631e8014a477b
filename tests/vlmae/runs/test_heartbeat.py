"""What the processes of a run say about themselves, and the end of one that hangs."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from vlmae.parallel.exit_codes import Preempted
from vlmae.runs.heartbeat import HUNG, Beat, Heartbeat, Stillness, describe_hang, read_beats

BEAT = Beat(
    process=0,
    processes=2,
    host="a",
    pid=7,
    job="",
    step=12,
    phase="training",
    phase_since=40.0,
    written=99.0,
    period_secs=5.0,
    ended="",
)


def test_what_a_process_writes(tmp_path):
    """It is there at once, follows the phases, and says how it ended."""
    with Heartbeat(tmp_path, max_idle_secs=0.0) as heart:
        (beat,) = read_beats(tmp_path)
        assert (beat.process, beat.processes, beat.pid) == (0, 1, os.getpid())
        assert (beat.step, beat.phase, beat.ended) == (0, "starting", "")
        heart.enter("saving", 4)
    (after,) = read_beats(tmp_path)
    assert (after.step, after.phase, after.ended) == (4, "saving", "complete")
    assert after.written >= beat.written


@pytest.mark.parametrize(("error", "ended"), [(OSError(), "failed"), (Preempted(), "preempted")])
def test_how_it_ended(tmp_path, error, ended):
    with pytest.raises(type(error)), Heartbeat(tmp_path, max_idle_secs=0.0):
        raise error
    assert read_beats(tmp_path)[0].ended == ended


def test_processes_of_an_earlier_start_do_not_count(tmp_path):
    """Four processes wrote; now there are two."""
    (tmp_path / "processes").mkdir()
    for process in range(4):
        beat = dataclasses.replace(BEAT, process=process, processes=2 if process < 2 else 4)
        path = tmp_path / "processes" / f"{process}.json"
        path.write_text(json.dumps(dataclasses.asdict(beat)))
    assert [beat.process for beat in read_beats(tmp_path)] == [0, 1]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "processes").mkdir()
    (tmp_path / "processes" / "0.json").write_text('{"process": 0}')
    with pytest.raises(ValueError, match=r"0\.json: .*missing"):
        read_beats(tmp_path)


def test_who_waits_where():
    """The last line is what lists of runs show; it names who is gone."""
    lost = dataclasses.replace(BEAT, process=1, host="b", phase="waiting for data", written=80.0)
    lines = describe_hang([BEAT, lost], 60.0, now=100.0).split("\n")
    assert lines == [
        "process 0 of 2 (a, pid 7): training, step 12, for 60 s",
        "process 1 of 2 (b, pid 7): waiting for data, step 12, for 60 s; no sign of life for 20 s",
        "no progress for train.max_idle_secs=60: no sign of life from process 1 on b",
    ]
    here = dataclasses.replace(lost, written=99.0)
    assert "all processes are alive" in describe_hang([BEAT, here], 60.0, now=100.0)


@pytest.mark.e2e
def test_a_suspended_process_goes_on(tmp_path, script_env):
    """Its clock went on without it: that is no time in which it hung."""
    code = """
import sys, time
from pathlib import Path
from vlmae.runs.heartbeat import Heartbeat

with Heartbeat(Path(sys.argv[1]), max_idle_secs=2.0) as heart:
    for step in range(5):
        heart.enter("training", step)
        print(step, flush=True)
        time.sleep(1.0)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=script_env, **pipes) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 0, err


def test_stillness_counts_ticks():
    still = Stillness("a")
    assert [still.tick("a", 2.0), still.tick("a", 2.0), still.tick("b", 2.0)] == [2.0, 4.0, 0.0]


def test_a_process_that_is_gone_or_has_failed(tmp_path):
    """On this host at the second silent look, elsewhere after a minute; old files say nothing."""
    (tmp_path / "processes").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    here, now = socket.gethostname(), time.time()
    other = dataclasses.replace(BEAT, process=1, host=here, pid=dead.pid, written=now)
    (tmp_path / "processes" / "0.json").write_text(json.dumps(dataclasses.asdict(BEAT)))
    stale = dataclasses.replace(other, written=now - 100, ended="failed")
    (tmp_path / "processes" / "1.json").write_text(json.dumps(dataclasses.asdict(stale)))
    heart = Heartbeat(tmp_path, max_idle_secs=0.0)

    def looks(beat: Beat, count: int, tick: float) -> list[str]:
        heart.others.clear()
        return [heart.lost_process([BEAT, beat], tick) for _ in range(count)]

    gone = f"process 1 of 2 ({here}, pid {dead.pid}) is gone"
    assert looks(stale, 20, 5.0) == [""] * 20
    assert looks(other, 3, 5.0) == ["", "", gone]
    assert looks(dataclasses.replace(other, pid=os.getpid()), 3, 5.0) == [""] * 3
    there = looks(dataclasses.replace(other, host="b"), 14, 5.0)
    assert there[:13] == [""] * 13
    assert there[13] == f"process 1 of 2 (b, pid {dead.pid}) is silent for 65 s"
    assert looks(dataclasses.replace(other, ended="complete"), 20, 5.0) == [""] * 20
    [failed] = looks(dataclasses.replace(other, ended="failed"), 1, 5.0)
    assert failed == f"process 1 of 2 ({here}, pid {dead.pid}) has failed"


@pytest.mark.e2e
def test_a_hung_process_is_ended(tmp_path, script_env):
    """With the place where it hangs; `error.txt` has the reason."""
    code = """
import sys, time
from pathlib import Path
from vlmae.runs.heartbeat import Heartbeat

def where_it_hangs():
    time.sleep(100)

with Heartbeat(Path(sys.argv[1]), max_idle_secs=0.5) as heart:
    heart.enter("waiting for data", 6)
    where_it_hangs()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, env=script_env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == HUNG
    assert "in where_it_hangs" in ended.stderr
    assert "waiting for data, step 6" in ended.stderr
    last = (tmp_path / "error.txt").read_text().strip().split("\n")[-1]
    assert last == "no progress for train.max_idle_secs=0.5: all processes are alive"
