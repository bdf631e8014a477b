"""Processes that train one model together: connecting, waiting, printing and failing."""

import contextlib
import functools
import itertools
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import jax
from annotated_types import Ge
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from data_pipelines.schema.checks import check, visible
from data_pipelines.schema.fields import Checked, Count

# Variables in which srun and Open MPI's mpirun give the number of tasks.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Variables in which a task finds its GPUs, and in which SLURM says that each task has its own.
VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
GPUS_PER_TASK = ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU")
DAY_SECS = 24 * 3600
_WAITS = itertools.count()  # numbers the barriers, whose names must differ


@dataclass(frozen=True)
class Processes(Checked):
    """Address of the other processes of this run; srun and mpirun need none of it."""

    coordinator: str = ""
    """HOST:PORT of process 0, the same for all; the port is free there."""
    num_processes: Count = 0
    """Processes of the run; with --coordinator."""
    process_id: Annotated[int, Ge(-1)] = -1
    """Number of this process, from 0; with --coordinator."""

    def check_together(self) -> None:
        """All three are set, or none."""
        given = (bool(self.coordinator), self.num_processes > 0, self.process_id >= 0)
        check(
            all(given) or not any(given),
            "--coordinator, --num-processes and --process-id belong together",
        )
        check(
            not any(given) or self.process_id < self.num_processes,
            f"--process-id {self.process_id} is not below --num-processes {self.num_processes}",
        )

    def connect(self) -> None:
        """Connect to the other processes, if there are any, before jax is used for anything else.

        Raises:
          RuntimeError: they did not connect within five minutes.
        """
        initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=60)
        if self.coordinator:
            initialize(self.coordinator, self.num_processes, self.process_id)
        elif any(int(os.environ.get(name, 1)) > 1 for name in TASK_COUNTS):
            initialize(local_device_ids=gpus_of_task(os.environ))


def gpus_of_task(environ: Mapping[str, str]) -> list[int] | None:
    """Divide the visible GPUs of a node among its SLURM tasks; None leaves the choice to JAX.

    JAX by itself gives every task one GPU, so a single task of a node would leave the others idle.
    Devices are numbered among the visible ones. Where SLURM shows each task its own
    (`srun --gpus-per-task=1`), a task takes all that it sees.

    Raises:
      UserError: the tasks of the node do not divide its GPUs.

    >>> node = {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}
    >>> gpus_of_task(node | {"SLURM_LOCALID": "1"})
    [4, 5, 6, 7]
    >>> gpus_of_task(node | {"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    [0, 1, 2, 3]
    """
    names = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID")
    if not all(name in environ for name in names):
        return None
    # SLURM writes "2(x4)" for 2 tasks on each of 4 nodes; the first number counts here.
    gpus, tasks, local = (int(re.match(r"\d+", environ[name])[0]) for name in names)
    visible = next((environ[name] for name in VISIBLE_GPUS if environ.get(name)), None)
    seen = gpus if visible is None else len(visible.split(","))
    # Within a step SLURM may count the GPUs of the task alone, or of the node.
    if seen < gpus or any(environ.get(name) for name in GPUS_PER_TASK):
        return list(range(seen))
    check(seen % tasks == 0, f"{tasks} tasks a node do not divide its {seen} GPUs")
    share = seen // tasks
    return list(range(local * share, (local + 1) * share))


def is_main_process() -> bool:
    """Return True in the one process that prints, logs and writes files; one alone is it too."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Wait until all processes have called this, up to a day.

    Collectives are less patient: on CPUs the first one fails if a process comes 30 s late.
    """
    # Names of barriers must be new each time, and the same in all processes, which count alike.
    everyone, name = set(range(jax.process_count())), f"wait {next(_WAITS)}"
    multihost.sync_global_processes(name, timeout=DAY_SECS, processes=everyone)


def decided_by_main(value: bool) -> bool:
    """Return the main process's value in all processes; all must call it."""
    several = jax.process_count() > 1
    return bool(multihost_utils.broadcast_one_to_all(value)) if several else value


def print_on_main_process(text: str) -> None:
    """Print in the main process only."""
    if is_main_process():
        print(visible(text), flush=True)  # names in files of others may stand in it


@contextlib.contextmanager
def abort_without_barrier() -> Iterator[None]:
    """End a failing process at once, without waiting for the others at exit.

    Otherwise they wait for it in their next collective, and it waits for them in jax's barrier at
    exit. A single process raises as usual, and so does an exit that all processes take together.
    """
    try:
        yield
    except BaseException as error:
        told = isinstance(error, SystemExit | KeyboardInterrupt)
        together = told and not isinstance(getattr(error, "code", None), str)
        if together or not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # skips jax's exit handlers, which would wait for the other processes
