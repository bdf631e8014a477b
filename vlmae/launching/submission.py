"""Submission of a run to submitit: launch flags, executor, job."""

import dataclasses
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.fields import Checked, Count, NonNegative, Size, flag
from vlmae.launching.job_record import JobRecord
from vlmae.launching.task import run_task

if TYPE_CHECKING:
    import submitit


@dataclass(frozen=True)
class LaunchConfig(Checked):
    """Launcher and resources of a run; by default it runs in this process."""

    launch: Literal["", "slurm", "local"] = ""
    """slurm: submit and return; local: run on this machine and wait. Needs the extra `cluster`."""
    nodes: Size = 1
    """Nodes of a run; local has one."""
    gpus_per_node: Count = 0
    """GPUs of a run on each node; 0 asks for none. Local: concurrent runs get different ones."""
    tasks_per_node: Size = 1
    """Processes of a run on each node, which share its GPUs. With one, the default, a node decodes
    by one set of workers and compiles the step once."""
    max_jobs: Count = 0
    """Runs of a sweep at the same time; 0 is all of them on SLURM and one on local."""
    partition: str = ""
    """SLURM partition; empty leaves the choice to SLURM, like the next two."""
    account: str = ""
    """SLURM account."""
    qos: str = ""
    """SLURM quality of service."""
    time_min: Size = 24 * 60
    """SLURM time limit, minutes. At the limit a run saves a checkpoint and is queued again."""
    save_secs: Size = 120
    """Seconds before the time limit at which the run is told to save."""
    cpus_per_task: Count = 0
    """CPU cores of each process: its data workers and one or two more; 0 leaves it to SLURM."""
    mem_gb: NonNegative = 0.0
    """Memory of each node, GB; 0 leaves it to SLURM."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch: constraint=a100 exclude=node7 exclusive."""
    setup: tuple[str, ...] = ()
    """Shell commands to run before it: "module load cuda"."""

    def check_together(self) -> None:
        """Check that the options fit each other, and that there is a launch that they are for."""
        gpus, tasks = self.gpus_per_node, self.tasks_per_node
        check(
            gpus % tasks == 0,
            f"--gpus-per-node={gpus} cannot be shared by --tasks-per-node={tasks}",
        )
        check(
            self.save_secs < 60 * self.time_min,
            f"--save-secs={self.save_secs} is not within --time-min={self.time_min}",
        )
        check(
            self.launch != "local" or self.nodes == 1,
            f"--launch=local has one node, not --nodes={self.nodes}",
        )
        for name, text in self._texts():
            # submitit writes each as a line of the batch script, where the next line is a command.
            check(
                text.isprintable(),
                f"{flag(name)} must be one line of text, not {text!r}",
            )
        given = self.given()
        check(bool(self.launch) or not given, f"{', '.join(given)}: only with --launch")

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Yield the options of sbatch that are text, by field."""
        for name in ("partition", "account", "qos"):
            yield name, getattr(self, name)
        yield from (("sbatch", text) for text in self.sbatch)

    def given(self) -> list[str]:
        """Return the flags that are not at their defaults, --launch left out."""
        names = [f.name for f in dataclasses.fields(self)[1:]]
        return [flag(name) for name in names if getattr(self, name) != getattr(LaunchConfig, name)]


@dataclass(frozen=True)
class LaunchedRun:
    """A run to launch."""

    title: str
    """Its name in messages: "run 3 of 0 ... 7", or "the run"."""
    workdir: Path
    command: tuple[str, ...]


def import_submitit():
    """Import submitit, set up for our signals.

    Raises:
      UserError: it is not installed; says how to.
    """
    # submitit reads both at its import, here and in the jobs: the signal before a time limit, and
    # no logging set-up, which would close the handlers of other libraries.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launch needs submitit: pip install 'vlmae[cluster]'") from error
    return submitit


def make_executor(
    options: LaunchConfig, folder: Path, name: str, **own: Any
) -> "submitit.AutoExecutor":
    """Make an executor of submitit.

    Args:
      options: the launcher and its resources.
      folder: for submitit's files.
      name: of the jobs.
      **own: parameters of submitit that only this launcher has.
    """
    # Its own classes are not used: AutoExecutor translates common options for each of them.
    executor = import_submitit().AutoExecutor(folder=folder, cluster=options.launch)
    executor.update_parameters(
        name=name,
        nodes=options.nodes,
        tasks_per_node=options.tasks_per_node,
        **own,
    )
    return executor


def slurm_parameters(options: LaunchConfig) -> dict[str, Any]:
    """Translate the options into parameters of submitit that SLURM alone has."""
    cpus = options.cpus_per_task
    optional = {
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": cpus,
        "mem_gb": options.mem_gb,
        "slurm_partition": options.partition,
        "slurm_account": options.account,
        "slurm_qos": options.qos,
        "slurm_array_parallelism": options.max_jobs,
        # Since SLURM 22.05, srun does not inherit it from sbatch.
        "slurm_srun_args": [f"--cpus-per-task={cpus}"] if cpus else [],
    }
    return {
        # What is not given is left out, so that the cluster's own defaults hold.
        **{name: value for name, value in optional.items() if value},
        "timeout_min": options.time_min,
        "slurm_signal_delay_s": options.save_secs,
        "slurm_additional_parameters": {"requeue": True, **sbatch_options(options.sbatch)},
        # The batch shell must survive these signals: it waits for the run, which saves at them.
        "slurm_setup": ["trap : TERM USR1", *options.setup],
    }


def sbatch_options(options: Sequence[str]) -> dict[str, str | bool]:
    """Parse options of sbatch into the form of submitit.

    >>> sbatch_options(["constraint=a100", "--exclusive"])
    {'constraint': 'a100', 'exclusive': True}
    """
    pairs = [option.removeprefix("--").partition("=") for option in options]
    return {name: value if equals else True for name, equals, value in pairs}


def submit(
    executor: "submitit.AutoExecutor", run: LaunchedRun, gpus: Sequence[str] | None = None
) -> "submitit.Job":
    """Submit one run; for `gpus` see `vlmae.launching.task.run_task`."""
    # A function of ours by name, with plain arguments: submitit pickles the call.
    return executor.submit(run_task, list(run.command), run.workdir.absolute(), gpus)


def record_of(job: "submitit.Job", options: LaunchConfig, run: LaunchedRun) -> JobRecord:
    """Make the content of `job.json`."""
    log = job.task(0).paths.stdout
    return JobRecord(
        options.launch, job.job_id, socket.gethostname(), str(log), run.command, time.time()
    )
