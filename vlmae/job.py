"""What runs inside of a job: the experiment's command, watched over. Imports no jax.

The command is a process of its own, so that a run that is killed still leaves a word, and that
no signal handler of submitit's is in its way.
"""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlmae.child_process import PREEMPTED, PREEMPTION_SIGNALS, describe_exit, start_child
from vlmae.result import forget_error, record_error


class JobFailed(RuntimeError):
    """The command failed; SLURM shall see it."""


def run_job(command: Sequence[str], workdir: Path, gpus: Sequence[str] | None = None) -> int:
    """Runs the command of a run in one task of a job, and has the job queued again if preempted.

    Args:
      command: as it is given on the command line.
      workdir: of the run; an `error.txt` is left there if the command dies without one.
      gpus: of this machine, by CUDA's numbers, that the tasks share; None leaves it to SLURM.

    Returns:
      0, or PREEMPTED: the run saved itself and is to be started again, which SLURM was told.

    Raises:
      JobFailed: the command failed, or SLURM would not queue the job again.
    """
    from submitit import JobEnvironment

    task = JobEnvironment()
    if task.global_rank == 0:
        forget_error(workdir)
    code = run_watched(
        [*command, *local_addresses(task.cluster, task.global_rank, task.num_tasks)],
        {} if gpus is None else own_gpus(gpus, task.global_rank, task.num_tasks),
    )
    if code == PREEMPTED:
        if task.cluster == "slurm" and task.global_rank == 0:
            queue_again(task.job_id)
        return PREEMPTED
    if code != 0:
        workdir.mkdir(parents=True, exist_ok=True)
        record_error(workdir, f"{describe_exit(code)}\n")
        raise JobFailed(describe_exit(code))
    return 0


def own_gpus(gpus: Sequence[str], rank: int, tasks: int) -> dict[str, str]:
    """The variable by which a task sees its share of the GPUs alone.

    >>> own_gpus(["4", "5", "6", "7"], rank=1, tasks=2)
    {'CUDA_VISIBLE_DEVICES': '6,7'}
    """
    share = len(gpus) // tasks
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[rank * share : (rank + 1) * share])}


def local_addresses(cluster: str, rank: int, tasks: int) -> list[str]:
    """Flags by which the tasks of a local job find each other; under SLURM, JAX asks SLURM."""
    if cluster == "slurm" or tasks == 1:
        return []
    # As JAX does it under SLURM: all tasks derive the same port from the job.
    port = 61440 + os.getppid() % 4096
    return [f"--coordinator=127.0.0.1:{port}", f"--num-processes={tasks}", f"--process-id={rank}"]


def run_watched(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs a command, to which SIGTERM and SIGUSR1 go on; returns its exit code.

    One that dies of such a signal, because it came before the command was prepared for it, counts
    as PREEMPTED as well: what it had saved before is whole.
    """
    with start_child(command, env) as process, passed_on(process) as received:
        code = process.wait()
    return PREEMPTED if -code in received else code


@contextlib.contextmanager
def passed_on(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """While in here, signals of preemption go to the process; yields the list of those that came.

    They replace submitit's own handlers.
    """
    received = []

    def pass_on(signum: int, frame: object) -> None:
        received.append(signum)
        process.send_signal(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in PREEMPTION_SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def queue_again(job: str) -> None:
    """Asks SLURM to queue this job again, if it still runs or has met its time limit.

    SLURM ends a job by SIGTERM as well when somebody cancels it, and that shall be the end; where
    it preempts one that may be queued again, it does so itself.

    Raises:
      JobFailed: SLURM would not; says why.
    """
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    state = re.search(r"JobState=(\S+)", shown)
    if state and state[1] != "RUNNING" and "Reason=TimeLimit" not in shown:
        print(f"job {job} was ended by SLURM, where it is {state[1]}", flush=True)
        return
    print(f"job {job} is queued again", flush=True)
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        raise JobFailed(f"the run saved itself, but was not queued again: {done.stderr.strip()}")
