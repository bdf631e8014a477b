"""`--launch slurm | local`: hands a run, or the missing runs of a sweep, to submitit.

python experiments/X.py --launch slurm --nodes 2 --gpus-per-node 8 --partition gpu [--sweep NAMES]

A job runs the very command line, without the flags of the launch. `local` goes the same way
without a scheduler, and waits (see `vlmae.launch_local`).
"""

import dataclasses
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_pipelines.config import check
from vlmae.heartbeat import read_beats
from vlmae.job import run_job
from vlmae.jobs import (
    JobRecord,
    ask_queue,
    is_active,
    is_alive,
    read_job,
    write_job,
)

if TYPE_CHECKING:
    import submitit

SLURM_ONLY = ("partition", "account", "qos", "time-min", "save-secs", "cpus-per-task", "mem-gb")
SLURM_ONLY += ("sbatch",)
TEN_YEARS_MIN = 10 * 365 * 24 * 60  # submitit's local executor knows no run without a limit


@dataclass(frozen=True)
class LaunchConfig:
    """Where runs are computed, if not in this process."""

    launch: Literal["", "slurm", "local"] = ""
    """Submit to SLURM and return, or run on this machine and wait; needs the extra `cluster`."""
    nodes: int = 1
    """Nodes of a run; local has one."""
    gpus_per_node: int = 0
    """GPUs of a run on each node; 0 asks for none. Local: concurrent runs get different ones."""
    tasks_per_node: int = 1
    """Processes of a run on each node; its GPUs are shared out among them.

    One owns all GPUs of its node by default: the node's clips are decoded by one set of workers,
    the step is compiled once, and fewer hosts have to find each other."""
    max_jobs: int = 0
    """Runs of a sweep at the same time; 0 is all of them on SLURM and one on local."""
    partition: str = ""
    account: str = ""
    qos: str = ""
    """Of SLURM, like the next ones; empty or 0 leaves out the flag of sbatch."""
    time_min: int = 24 * 60
    """Time limit, minutes. At the limit a run saves itself and is queued again."""
    save_secs: int = 120
    """Seconds before the time limit at which the run is told to save itself."""
    cpus_per_task: int = 0
    """CPU cores of each process: data workers and one or two more."""
    mem_gb: float = 0.0
    """Memory of each node, GB."""
    sbatch: tuple[str, ...] = ()
    """Other options of sbatch: constraint=a100 exclude=node7 exclusive."""
    setup: tuple[str, ...] = ()
    """Shell commands that come before the run: "module load cuda"."""

    def __post_init__(self):
        for name in ("nodes", "tasks_per_node", "time_min", "save_secs"):
            check(getattr(self, name) >= 1, f"--{flag(name)} must be at least 1")
        for name in ("gpus_per_node", "max_jobs", "cpus_per_task", "mem_gb"):
            check(getattr(self, name) >= 0, f"--{flag(name)} must not be negative")
        gpus, tasks = self.gpus_per_node, self.tasks_per_node
        check(gpus % tasks == 0, f"--gpus-per-node {gpus} cannot be shared by {tasks} tasks")
        check(
            self.save_secs < 60 * self.time_min,
            f"--save-secs {self.save_secs} is not within --time-min {self.time_min}",
        )
        check(
            self.launch != "local" or self.nodes == 1,
            f"--launch local has one node, not {self.nodes}",
        )
        given = self.given()
        check(bool(self.launch) or not given, f"--{', --'.join(given)}: only with --launch")

    def given(self) -> list[str]:
        """The flags, but --launch, that are not at their defaults."""
        names = [f.name for f in dataclasses.fields(self)[1:]]
        return [flag(name) for name in names if getattr(self, name) != getattr(LaunchConfig, name)]


@dataclass(frozen=True)
class LaunchedRun:
    """A run that is not complete."""

    title: str
    """ "run 3 of 0 ... 7", or "the run"."""
    workdir: Path
    command: tuple[str, ...]


def flag(name: str) -> str:
    """`gpus_per_node` -> "gpus-per-node"."""
    return name.replace("_", "-")


def without_launch_flags(argv: Sequence[str]) -> list[str]:
    """A command line without the flags of `LaunchConfig` and their values.

    >>> without_launch_flags(["x.py", "--nodes", "2", "--seed=1", "--setup", "a", "b"])
    ['x.py', '--seed=1']
    """
    ours = {flag(field.name) for field in dataclasses.fields(LaunchConfig)}
    kept, dropping = [], False
    for arg in argv:
        if arg.startswith("--"):
            dropping = flag(arg[2:].split("=")[0]) in ours
        if not dropping:
            kept.append(arg)
    return kept


def launch(options: LaunchConfig, runs: Sequence[LaunchedRun], root: Path) -> int:
    """Launches those of the runs that neither wait nor run already.

    Args:
      options: where, and with what.
      runs: what is to be done; none of them is complete.
      root: of the sweep, or of the run itself; submitit's files go to `jobs` in here.

    Returns:
      The exit code: 0 if all went well so far, 1 if a run failed, 130 after Ctrl-C.

    Raises:
      ValueError: submitit or SLURM is not there, or sbatch refuses the options.
    """
    import_submitit()
    check(
        options.launch == "local" or shutil.which("sbatch") is not None,
        "--launch slurm: there is no sbatch here (is this a node of the cluster?)",
    )
    idle = idle_runs(runs)
    if not idle:
        print("nothing to launch")
        return 0
    if options.launch == "local":
        from vlmae.launch_local import run_local

        unused = [name for name in options.given() if name in SLURM_ONLY]
        if unused:
            print(f"note: not used by --launch local: --{', --'.join(unused)}", file=sys.stderr)
        return run_local(options, idle, root)
    submit_slurm(options, idle, root)
    return 0


def import_submitit():
    """The module.

    Raises:
      ValueError: it is not installed; says how to.
    """
    # Read when submitit is imported, here and in the jobs: the signal before a time limit, and
    # that it leaves the loggers of other libraries alone (it would close their handlers).
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    try:
        import submitit
    except ImportError as error:
        raise ValueError("--launch needs submitit: pip install 'vlmae[cluster]'") from error
    return submitit


def idle_runs(runs: Sequence[LaunchedRun]) -> list[LaunchedRun]:
    """The runs without those that wait or run already, which it names."""
    records, now = [read_job(run.workdir) for run in runs], time.time()
    queue, idle = ask_queue(records), []
    for run, record in zip(runs, records, strict=True):
        beats = read_beats(run.workdir)
        if is_active(record, queue) or any(is_alive(beat, now) for beat in beats):
            job = f" (job {record.job})" if record else ""
            print(f"{run.title} waits or runs already{job}: {run.workdir}")
        else:
            idle.append(run)
    return idle


def submit_slurm(options: LaunchConfig, runs: Sequence[LaunchedRun], root: Path) -> None:
    """Submits one job, or an array; prints ids, logs, and how to watch.

    Raises:
      ValueError: sbatch refuses; says why.
    """
    executor = make_executor(options, root / "jobs", job_name(root))
    try:
        with executor.batch():
            jobs = [submit(executor, run) for run in runs]
    except Exception as error:
        if type(error).__name__ != "FailedJobError":
            raise
        raise ValueError(f"sbatch refused: {str(error).strip()}") from error
    for run, job in zip(runs, jobs, strict=True):
        write_job(run.workdir, record_of(job, options, run))
        print(f"{run.title} is job {job.job_id}: {run.workdir}")
    print(f"logs are in {root / 'jobs'}; to watch: python -m vlmae.status {root}")


def make_executor(options: LaunchConfig, folder: Path, name: str) -> "submitit.AutoExecutor":
    """An executor with all options; what is SLURM's alone, submitit leaves out of a local one."""
    executor = import_submitit().AutoExecutor(folder=folder, cluster=options.launch)
    shared = {"nodes": options.nodes, "tasks_per_node": options.tasks_per_node, "name": name}
    if options.launch == "local":
        executor.update_parameters(**shared, timeout_min=TEN_YEARS_MIN)
        return executor
    cpus = options.cpus_per_task
    optional = {
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": cpus,
        "mem_gb": options.mem_gb,
        "slurm_partition": options.partition,
        "slurm_account": options.account,
        "slurm_qos": options.qos,
        "slurm_array_parallelism": options.max_jobs,
        # Since SLURM 22.05, srun does not take it over from sbatch.
        "slurm_srun_args": [f"--cpus-per-task={cpus}"] if cpus else [],
    }
    executor.update_parameters(
        **shared,
        **{name: value for name, value in optional.items() if value},
        timeout_min=options.time_min,
        slurm_signal_delay_s=options.save_secs,
        slurm_additional_parameters={"requeue": True, **sbatch_options(options.sbatch)},
        # The shell waits for the run, which saves itself at these signals.
        slurm_setup=["trap : TERM USR1", *options.setup],
    )
    return executor


def sbatch_options(options: Sequence[str]) -> dict[str, str | bool]:
    """Options of sbatch, as submitit takes them.

    >>> sbatch_options(["constraint=a100", "--exclusive"])
    {'constraint': 'a100', 'exclusive': True}
    """
    pairs = [option.removeprefix("--").partition("=") for option in options]
    return {name: value if equals else True for name, equals, value in pairs}


def submit(
    executor: "submitit.AutoExecutor", run: LaunchedRun, gpus: Sequence[str] | None = None
) -> "submitit.Job":
    """Submits one run; for `gpus` see `run_job`."""
    return executor.submit(run_job, list(run.command), run.workdir.absolute(), gpus)


def record_of(job: "submitit.Job", options: LaunchConfig, run: LaunchedRun) -> JobRecord:
    """What `job.json` shall hold."""
    log = job.task(0).paths.stdout
    return JobRecord(
        options.launch, job.job_id, socket.gethostname(), str(log), run.command, time.time()
    )


def job_name(root: Path) -> str:
    """What squeue shows: the name of the work directory, where it is one word of plain letters."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in root.absolute().name)
