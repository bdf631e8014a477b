"""One owner of a work directory: on this host by its process, on others by its file's time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vlmae.runs import owner
from vlmae.runs.owner import InUseError, check_free, own

HOLD = (
    "import sys, time, pathlib; from vlmae.runs.owner import own\n"
    "with own(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def holder(tmp_path):
    """A process that owns `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def rewrite(folder, **changes) -> None:
    """Change what the newest owner's file says."""
    path = owner._newest(folder / owner.FOLDER, "run")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def age(folder, secs: float) -> None:
    path = owner._newest(folder / owner.FOLDER, "run")
    os.utime(path, (time.time() - secs,) * 2)


def test_the_second_is_refused_with_process_and_host(holder, tmp_path):
    message = rf"run is in use by process {holder.pid} on {owner.socket.gethostname()} \(-c "
    for attempt in (
        lambda: own(tmp_path / "run").__enter__(),
        lambda: check_free(tmp_path / "run"),
    ):
        with pytest.raises(InUseError, match=message) as refused:
            attempt()
        assert "\n" not in str(refused.value)
    age(tmp_path / "run", 10 * owner.DEAD_SECS)  # silence says nothing where the process is seen
    with pytest.raises(InUseError):
        own(tmp_path / "run").__enter__()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    with own(tmp_path / "run"):
        assert owner._number(owner._newest(tmp_path / "run" / "owner", "run")) == 2


def test_another_process_of_the_same_number_holds_nothing(holder, tmp_path):
    rewrite(tmp_path / "run", started=1)
    with own(tmp_path / "run"):
        pass


def test_a_zombie_holds_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    deadline = time.monotonic() + 20
    while owner.start_of(process.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert owner.start_of(process.pid) is None
    process.wait()


@pytest.mark.parametrize("place", [{"host": "node7"}, {"space": "another container"}])
def test_an_owner_elsewhere_lives_as_long_as_its_file_is_touched(holder, tmp_path, place):
    folder = tmp_path / "run"
    rewrite(folder, **place)
    host = place.get("host", owner.socket.gethostname())
    with pytest.raises(InUseError, match=f"process {holder.pid} on {host}"):
        own(folder).__enter__()
    holder.send_signal(signal.SIGSTOP)  # it would touch its file
    age(folder, owner.DEAD_SECS + 1)
    with own(folder):
        pass


def test_an_owner_elsewhere_that_is_silent_is_waited_for(tmp_path, monkeypatch, capsys):
    folder = tmp_path
    (folder / "config.json").touch()
    with own(folder):
        pass
    rewrite(folder, host="node7", ended=False)
    age(folder, owner.DEAD_SECS - 1)
    monkeypatch.setattr(owner, "BEAT_SECS", 0.6)
    with own(folder):
        pass
    assert "on node7 has been silent for 119 s; it counts as dead after 120 s" in (
        capsys.readouterr().err
    )


def test_the_owner_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_SECS", 0.05)
    with own(tmp_path):
        age(tmp_path, 100)
        time.sleep(0.4)
        assert time.time() - owner._newest(tmp_path / "owner", "run").stat().st_mtime < 5


def test_a_suspended_process_that_was_replaced_ends(tmp_path):
    code = HOLD.replace("with own", "from vlmae.runs import owner; owner.BEAT_SECS = 0.1\nwith own")
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        (tmp_path / "owner" / "run.000002.json").write_text("{}")
        assert process.wait(20) == owner.TAKEN_OVER
        assert b"another process has taken over" in process.stderr.read()


CONTEND = """
import os, pathlib, sys, time
from vlmae.runs.owner import InUseError, own
folder, links = pathlib.Path(sys.argv[1]), sys.argv[2] == "True"
def refuse(*_):
    raise PermissionError(1, "Operation not permitted")
if not links:
    os.link = refuse
print("ready", flush=True)
sys.stdin.readline()
try:
    with own(folder):
        print("owner", flush=True)
        sys.stdin.readline()
except InUseError:
    print("refused", flush=True)
"""


@pytest.mark.parametrize("links", [True, False])
def test_of_many_at_once_one_wins(holder, tmp_path, links):
    """They all find the same dead owner; also where the file system knows no links."""
    holder.kill()
    holder.wait()
    command = [sys.executable, "-c", CONTEND, str(tmp_path / "run"), str(links)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    processes = [subprocess.Popen(command, **pipes) for _ in range(6)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
    assert (
        sorted(process.stdout.readline() for process in processes)
        == ["owner\n"] + ["refused\n"] * 5
    )
    for process in processes:
        process.communicate()


def test_roles_do_not_disturb_each_other(tmp_path):
    with own(tmp_path, "launcher"), own(tmp_path):
        with pytest.raises(InUseError):
            own(tmp_path, "launcher").__enter__()


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with own(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with own(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    with own(tmp_path / "new"):
        pass
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["file", "owner"]
