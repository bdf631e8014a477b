"""A task of a job: supervises the experiment's command. Imports no jax.

The command is a process of its own, so that a run that is killed still leaves an `error.txt`, and
submitit's signal handlers are not in its way.
"""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vlmae.launching.child_process import describe_exit, run_child
from vlmae.parallel.exit_codes import PREEMPTED
from vlmae.runs.result import forget_error, record_error


class TaskFailed(RuntimeError):
    """The command failed, and so does the job."""


def run_task(command: Sequence[str], workdir: Path, gpus: Sequence[str] | None = None) -> int:
    """Run the command of a run in one task of a job; requeue the job if it was preempted.

    Args:
      command: the command line of the experiment.
      workdir: of the run; gets an `error.txt` if the command dies without one.
      gpus: GPUs of this machine for all tasks together, by CUDA's numbers; None leaves it to SLURM.

    Returns:
      0, or PREEMPTED if the run saved a checkpoint and is to be started again.

    Raises:
      TaskFailed: the command failed, or SLURM would not queue the job again.
    """
    from submitit import JobEnvironment  # an extra

    task = JobEnvironment()
    if task.global_rank == 0:  # one of them: a late process must not remove another's new error
        forget_error(workdir)
    code = run_child(
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
        raise TaskFailed(describe_exit(code))
    return 0


def own_gpus(gpus: Sequence[str], rank: int, tasks: int) -> dict[str, str]:
    """Make the environment variable by which a task sees only its share of the GPUs.

    >>> own_gpus(["4", "5", "6", "7"], rank=1, tasks=2)
    {'CUDA_VISIBLE_DEVICES': '6,7'}
    """
    share = len(gpus) // tasks
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[rank * share : (rank + 1) * share])}


def local_addresses(cluster: str, rank: int, tasks: int) -> list[str]:
    """Make the flags by which the tasks of a local job find each other; SLURM tells JAX itself."""
    if cluster == "slurm" or tasks == 1:
        return []
    # The parent of all tasks is the job, so that all derive the same port, as JAX does under SLURM.
    port = 61440 + os.getppid() % 4096
    return [f"--coordinator=127.0.0.1:{port}", f"--num-processes={tasks}", f"--process-id={rank}"]


def queue_again(job: str) -> None:
    """Ask SLURM to queue this job again, if it still runs or has met its time limit.

    In any other state SLURM is ending the job: `scancel` sends SIGTERM too and must be final, and
    a job that SLURM preempts it queues again itself.

    Raises:
      TaskFailed: SLURM refuses; says why.
    """
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    state = re.search(r"JobState=(\S+)", shown)
    if state and state[1] != "RUNNING" and "Reason=TimeLimit" not in shown:
        print(f"job {job} was ended by SLURM, where it is {state[1]}", flush=True)
        return
    print(f"job {job} is queued again", flush=True)
    # By ourselves, since submitit requeues by its own signal handlers, which are replaced here.
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        raise TaskFailed(f"the run saved itself, but was not queued again: {done.stderr.strip()}")
