"""Several processes that train one model: how they find each other, and which one writes."""

import contextlib
import functools
import itertools
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
from orbax.checkpoint import multihost

from data_pipelines.config import check

# How many tasks the launcher started, in the words of srun and of Open MPI's mpirun.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
DAY_SECS = 24 * 3600
_WAITS = itertools.count()  # no two may have the same name


@dataclass(frozen=True)
class Processes:
    """Where the other processes of this run are. Under srun and mpirun nothing is to be set."""

    coordinator: str = ""
    """HOST:PORT of process 0, the same for all; the port is free there."""
    num_processes: int = 0
    """All processes of the run; with --coordinator."""
    process_id: int = -1
    """The number of this one, from 0; with --coordinator."""

    def __post_init__(self):
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
        """Waits for the other processes, if there are any; before jax is used for anything else.

        Raises:
          RuntimeError: they did not come within five minutes.
        """
        initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=60)
        if self.coordinator:
            initialize(self.coordinator, self.num_processes, self.process_id)
        elif any(int(os.environ.get(name, 1)) > 1 for name in TASK_COUNTS):
            initialize(local_device_ids=gpus_of_task(os.environ))


def gpus_of_task(environ: Mapping[str, str]) -> list[int] | None:
    """The share of its node's GPUs that falls to a SLURM task; None leaves it to JAX.

    JAX by itself gives every task one GPU, so that a single task of a node would leave the others
    idle.

    Raises:
      ValueError: the tasks of the node do not divide its GPUs.

    >>> gpus_of_task({"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    ...               "SLURM_LOCALID": "1"})
    [4, 5, 6, 7]
    """
    names = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID")
    if not all(name in environ for name in names):
        return None
    gpus, tasks, local = (int(re.match(r"\d+", environ[name])[0]) for name in names)
    check(gpus % tasks == 0, f"{tasks} tasks a node do not divide its {gpus} GPUs")
    share = gpus // tasks
    return list(range(local * share, (local + 1) * share))


def is_first() -> bool:
    """True in the one process that prints, logs and writes files; alone is first."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Waits until all processes are here, up to a day.

    Collectives are less patient: on CPUs the first one fails if some process comes 30 s late.
    """
    everyone, name = set(range(jax.process_count())), f"wait {next(_WAITS)}"
    multihost.sync_global_processes(name, timeout=DAY_SECS, processes=everyone)


def print_first(text: str) -> None:
    """Prints in the first process only."""
    if is_first():
        print(text, flush=True)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ends one of several processes right where it fails, without waiting for the others.

    They would wait for it in their next collective, and it for them on its way out. A process that
    is alone raises as usual, and so does an exit that all of them take.
    """
    try:
        yield
    except BaseException as error:
        together = isinstance(error, SystemExit) and not isinstance(error.code, str)
        if together or not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
