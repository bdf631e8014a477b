"""Several processes train one model as one process does, however they are interrupted."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from local_processes import LocalRun, end_of, free_port, wait_until
from run_checks import EVALUATION, assert_same_run, flat_params, history

from data_pipelines.schema.checksum import read_sums
from vlmae.parallel.exit_codes import PREEMPTED
from vlmae.parallel.processes import Processes, gpus_of_task
from vlmae.parallel.sharding import part_of
from vlmae.runs.heartbeat import HUNG
from vlmae.runs.result import last_error


@pytest.fixture
def make_run(tiny_data_dir, tmp_path, script_env):
    """Makes runs of the tiny experiment, by name."""

    def make(name: str, **flags: object) -> LocalRun:
        return LocalRun(tiny_data_dir, tmp_path / name, script_env, **flags)

    return make


def assert_close_run(ours: LocalRun, theirs: LocalRun) -> None:
    """Parameters and history, but for the order in which four devices are summed up."""
    left, right = flat_params(ours.workdir), flat_params(theirs.workdir)
    assert left.keys() == right.keys()
    for name, values in left.items():
        if name.endswith("key/bias"):  # the softmax ignores it: Adam moves it by rounding errors
            continue
        np.testing.assert_allclose(values, right[name], atol=2e-5, err_msg=name)
    lines = history(ours.workdir)
    assert [line["step"] for line in lines] == [line["step"] for line in history(theirs.workdir)]
    for line, expected in zip(lines, history(theirs.workdir), strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)


def assert_same_evaluation(ours: LocalRun, theirs: LocalRun) -> None:
    for name in EVALUATION:
        assert (ours.workdir / name).read_text() == (theirs.workdir / name).read_text(), name


@pytest.mark.timeout(600)
def test_two_processes_are_two_devices(make_run):
    """Losses of every step, parameters and what the evaluation writes; only the first one talks."""
    flags = {"train.steps": 4, "mesh.data": 1, "mesh.fsdp": 2}
    two, one = make_run("two", **flags), make_run("one", **flags)
    first, second = two.run(processes=2)
    one.run(processes=1, devices=2)
    assert_same_run(two.workdir, one.workdir)
    assert_same_evaluation(two, one)
    assert "step 4/4" in first.out and "text to video" in first.out
    assert "step" not in second.out and "text to video" not in second.out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", [0, -1])  # the files are divided among the processes
def test_two_processes_leave_out_a_damaged_checkpoint(make_run, tmp_path, place):
    """Whichever finds the damage, both go on from the checkpoint before."""
    flags = {"train.steps": 4, "train.save_every_steps": 2, "mesh.data": 1, "mesh.fsdp": 2}
    run = make_run("run", **flags)
    run.run(processes=2)
    unbroken = shutil.copytree(run.workdir, tmp_path / "unbroken")
    folder = run.workdir / "checkpoints/4/state"
    path = folder / sorted(read_sums(folder))[place]
    path.write_bytes(path.read_bytes()[:-1])
    first, second = run.run(processes=2)
    assert f"step 4 cannot be restored: {path} is damaged" in first.out
    assert "continuing from step 2" in first.out
    assert "step" not in second.out
    assert_same_run(run.workdir, unbroken)


@pytest.mark.parametrize(
    ("sizes", "process_of", "parts"),
    [
        ((4, 1, 1), [0, 0, 1, 1], [(0, 2), (1, 2)]),
        ((2, 2, 1), [0, 1, 2, 3], [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 2), [0, 1, 2, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # pairs hold the same rows
        ((1, 1, 4), [0, 0, 1, 1], [(0, 1), (0, 1)]),
    ],
)
def test_part_of_each_process(sizes, process_of, parts):
    owners = np.reshape(process_of, sizes)
    assert [part_of(owners, process) for process in range(len(parts))] == parts


def test_rows_that_do_not_lie_together_are_refused():
    with pytest.raises(ValueError, match=r"process 0 the parts \[0, 2\] of a batch"):
        part_of(np.reshape([0, 1, 0, 1], (4, 1, 1)), 0)


def test_gpus_of_a_task():
    """Each task of a node has its share of the node's GPUs; elsewhere JAX decides."""
    node = {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    assert gpus_of_task(node) == list(range(8))
    tasks = node | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}
    assert gpus_of_task(tasks) == [5]
    assert gpus_of_task(tasks | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}) == [5]
    assert gpus_of_task({}) is None
    with pytest.raises(ValueError, match="3 tasks a node do not divide its 8 GPUs"):
        gpus_of_task(node | {"SLURM_STEP_TASKS_PER_NODE": "3"})


@pytest.mark.parametrize("gpus", ["8", "1"])  # of the node, or of the task
@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("5", 1), ("4,5", 2)])
def test_a_task_that_sees_only_its_own_gpus_takes_them_all(gpus, visible, count):
    """As of `srun --gpus-per-task=1`: number 5 among one visible device does not exist."""
    task = {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5", "SLURM_GPUS_ON_NODE": gpus}
    task |= {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_PER_TASK": str(count)}
    assert gpus_of_task(task) == list(range(count))
    if gpus == "8":  # bound by --gpu-bind, which sets no other variable
        del task["SLURM_GPUS_PER_TASK"]
        assert gpus_of_task(task) == list(range(count))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "host:1"}, "belong together"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "is not below"),
    ],
)
def test_incomplete_addresses_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Processes(**fields)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_processes_and_on_with_fewer(make_run):
    """On a mesh that is cut both ways; told to end, and continued by one and by two processes."""
    flags = {"train.steps": 12, "train.save_every_steps": 100, "mesh.data": 2, "mesh.fsdp": 2}
    one = make_run("one", **flags)
    one.run(processes=1, devices=4)
    for fewer in (1, 2):
        four = make_run(f"on_with_{fewer}", **flags)
        with four.started(processes=4) as running:
            wait_until(lambda run=four: run.step() >= 3, running)
            running[fewer].send_signal(signal.SIGTERM)
            ended = [end_of(process) for process in running]
        assert [process.code for process in ended] == [PREEMPTED] * 4, ended
        assert 3 <= four.step() < 12
        four.run(processes=fewer, devices=4 // fewer)
        assert_close_run(four, one)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_heads_cut_across_processes(make_run):
    """Both processes then read the same rows."""
    flags = {"train.steps": 3, "mesh.data": 1, "mesh.tensor": 2}
    two, one = make_run("two", **flags), make_run("one", **flags)
    two.run(processes=2)
    one.run(processes=1, devices=2)
    assert_same_run(two.workdir, one.workdir)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_interruptions(make_run):
    """SIGTERM to one of two processes, or SIGKILL to both, at random moments of a run."""
    flags = {"train.steps": 60, "train.save_every_steps": 5, "mesh.fsdp": 2, "mesh.data": 1}
    unbroken, broken = make_run("unbroken", **flags), make_run("broken", **flags)
    unbroken.run(processes=2)
    rng, codes = random.Random(0), []
    for interruption in range(20):
        with broken.started(processes=2) as running:
            start, steps = broken.step(), rng.randrange(4)
            wait_until(lambda start=start, steps=steps: broken.step() > start + steps, running)
            time.sleep(rng.uniform(0, 0.2))
            if interruption % 2:
                for process in running:
                    process.kill()
            else:
                running[rng.randrange(2)].send_signal(rng.choice([signal.SIGTERM, signal.SIGUSR1]))
            codes.append([end_of(process).code for process in running])
    told = [pair for pair in codes if pair == [PREEMPTED] * 2]
    killed = [pair for pair in codes if -signal.SIGKILL in pair]
    assert len(told) >= 5 and len(killed) >= 5, codes
    broken.run(processes=2)
    assert_same_run(broken.workdir, unbroken.workdir)
    assert_same_evaluation(broken, unbroken)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others(make_run, victim, number):
    """Killed, or only hung: the other one says so and leaves, within the configured time."""
    run = make_run("run", **{"train.steps": 5000, "train.max_idle_secs": 300})
    with run.started(processes=2) as running:
        wait_until(lambda: run.step() >= 3, running)
        running[victim].send_signal(number)
        start = time.monotonic()
        other = end_of(running[1 - victim], timeout_secs=120)
        secs = time.monotonic() - start
    assert other.code != 0 and secs < 100, (secs, other)
    if victim == 0:  # JAX's runtime may end the other first, by an abort
        assert other.err.strip()
        return
    [line] = other.err.strip().splitlines()
    assert line == last_error(run.workdir) and "this one ends too" in line
    assert ("is gone" in line and secs < 20) if number == signal.SIGKILL else "is silent" in line
    assert other.code == HUNG


LATE = """
import sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from vlmae.parallel.processes import Processes, wait_for_all

Processes(sys.argv[1], 2, int(sys.argv[2])).connect()
time.sleep(35 * int(sys.argv[2]))
wait_for_all()
print(multihost_utils.process_allgather(np.ones(1)).sum())
"""


@pytest.mark.slow
def test_a_process_may_come_late():
    """By more than the 30 s that the first collective has patience for."""
    command = [sys.executable, "-c", LATE, f"127.0.0.1:{free_port()}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    options = {"env": env, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(i)], **options) for i in range(2)]
    assert [process.communicate()[0].split()[-1] for process in both] == ["2.0", "2.0"]
