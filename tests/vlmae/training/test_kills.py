"""A run that is killed again and again ends like an unbroken one, bit for bit."""

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from killed_runs import Killed, newest, saving
from run_checks import EVALUATION, assert_same_run

from vlmae.parallel.exit_codes import INTERRUPTED, PREEMPTED
from vlmae.runs.heartbeat import read_beats
from vlmae.runs.result import read_result

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
CODES = {
    signal.SIGTERM: PREEMPTED,
    signal.SIGUSR1: PREEMPTED,
    signal.SIGINT: INTERRUPTED,
    signal.SIGKILL: -signal.SIGKILL,
}


@pytest.fixture
def make_run(tiny_data_dir, tmp_path, script_env):
    def make(name: str, **flags: object) -> Killed:
        return Killed(tiny_data_dir, tmp_path / name, script_env, **flags)

    return make


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_in_the_first_second(make_run, number):
    """While Python imports: there is nothing to save, and one line to say."""
    run = make_run("run")
    code, err = run.run_until(lambda: True, number)
    assert (code, err) == (CODES[number], f"told to end by {number.name}\n")
    assert not run.workdir.exists()


@pytest.mark.timeout(600)
def test_killed_in_a_save(make_run):
    """One SIGKILL while a checkpoint is being written; the same command line goes on."""
    flags = {"train.steps": 8, "train.save_every_steps": 1}
    unbroken, killed = make_run("unbroken", **flags), make_run("killed", **flags)
    unbroken.run()
    in_a_save = lambda: newest(killed.workdir) >= 2 and saving(killed.workdir)  # noqa: E731
    assert killed.run_until(in_a_save, signal.SIGKILL)[0] == -signal.SIGKILL
    assert 2 <= newest(killed.workdir) < 8
    killed.run()
    assert_same_run(killed.workdir, unbroken.workdir)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_killed_at_any_moment(make_run, num_workers):
    """Thirty signals of each kind in turn, from the first second to the end of the evaluation."""
    flags = {
        "train.steps": 30,
        "train.save_every_steps": 4,
        "train.eval_every_steps": 10,
        "data.num_workers": num_workers,
    }
    unbroken, killed = make_run("unbroken", **flags), make_run("killed", **flags)
    unbroken.run()
    start = time.monotonic()
    make_run("timed", **flags).run()  # its programs are compiled by now
    longest, rng = time.monotonic() - start, random.Random(num_workers)
    kills, phases, complete = Counter(), Counter(), 0
    while kills.total() < 30:
        number = list(CODES)[kills.total() % len(CODES)]
        deadline = time.monotonic() + rng.uniform(0, longest)
        started = time.time()
        code, err = killed.run_until(lambda at=deadline: time.monotonic() > at, number)
        beats = read_beats(killed.workdir) if killed.workdir.exists() else []
        phase = beats[0].phase if beats and beats[0].written > started else "not begun"
        assert code in (0, CODES[number]), (number, phase, code, err)
        assert "Traceback" not in err, (number, phase, err)
        print(signal.Signals(number).name, phase, code, flush=True)
        kills[number] += code != 0
        phases[phase] += code != 0
        if code == 0:
            complete += 1
            assert read_result(killed.workdir)
            assert_same(killed, unbroken)
            shutil.rmtree(killed.workdir)
    killed.run()
    assert_same(killed, unbroken)
    print(f"{kills.total()} kills in {dict(phases)}, {complete} runs complete before one")
    assert len(phases) >= 3


def assert_same(killed: Killed, unbroken: Killed) -> None:
    assert_same_run(killed.workdir, unbroken.workdir)
    for name in EVALUATION:
        assert (killed.workdir / name).read_text() == (unbroken.workdir / name).read_text(), name
