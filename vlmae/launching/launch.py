"""`--launch NAME`: hands a run, or the missing runs of a sweep, to a launcher.

    python experiments/quickstart.py --launch slurm --gpus-per-node 1 --sweep method,seed

Each job runs the same command line without the launch flags. A launcher is a function in
`LAUNCHERS`; its name is also a choice of `LaunchConfig.launch` and has a check in
`job_record.ACTIVE`.
"""

import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.fields import flag
from vlmae.launching.job_record import ask_queue, is_active, is_alive, read_job, write_job
from vlmae.launching.local_scheduler import run_local
from vlmae.launching.submission import (
    LaunchConfig,
    LaunchedRun,
    import_submitit,
    make_executor,
    record_of,
    slurm_parameters,
    submit,
)
from vlmae.runs.heartbeat import read_beats
from vlmae.runs.owner import own

LAUNCHER = "launcher"  # role of its owner: the runs below have owners of their own


def without_launch_flags(argv: Sequence[str]) -> list[str]:
    """Drop the flags of `LaunchConfig` and their values from a command line.

    >>> without_launch_flags(["x.py", "--nodes", "2", "--seed=1", "--setup", "a", "b"])
    ['x.py', '--seed=1']
    """
    ours = {flag(field.name) for field in dataclasses.fields(LaunchConfig)}
    kept, dropping = [], False
    for arg in argv:
        if arg.startswith("--"):
            # tyro takes --gpus_per_node as well, which `flag` spells with dashes.
            dropping = flag(arg[2:].split("=")[0]) in ours
        if not dropping:
            kept.append(arg)
    return kept


def launch(options: LaunchConfig, runs: Sequence[LaunchedRun], root: Path) -> int:
    """Launch the runs that do not wait or run already.

    Args:
      options: the launcher and its resources.
      runs: runs that are not complete.
      root: folder of the sweep, or of the run itself; submitit's files go to its `jobs`.

    Returns:
      The exit code: 0 if all went well so far, 1 if a run failed, 130 after Ctrl-C.

    Raises:
      UserError: the launcher is not available here, or refuses the options.
      InUseError: another launcher works in the folder.
    """
    import_submitit()  # first of all: a missing package is not to be found halfway
    with own(root, LAUNCHER):  # while jobs are submitted, and as long as a local scheduler runs
        idle = idle_runs(runs)
        if not idle:
            print("nothing to launch")
            return 0
        return LAUNCHERS[options.launch](options, idle, root)


def idle_runs(runs: Sequence[LaunchedRun]) -> list[LaunchedRun]:
    """Return the runs that neither wait nor run; prints a line for each of the others."""
    records, now = [read_job(run.workdir) for run in runs], time.time()
    queue, idle = ask_queue(records), []
    for run, record in zip(runs, records, strict=True):
        beats = read_beats(run.workdir)
        # Either is enough: a queued job has no heartbeat, and a run started by hand no job.
        if is_active(record, queue) or any(is_alive(beat, now) for beat in beats):
            job = f" (job {record.job})" if record else ""
            print(f"{run.title} waits or runs already{job}: {run.workdir}")
        else:
            idle.append(run)
    return idle


def submit_slurm(options: LaunchConfig, runs: Sequence[LaunchedRun], root: Path) -> int:
    """Submit one job, or an array, and return; prints ids, logs, and how to watch.

    Raises:
      UserError: SLURM is not installed here, or sbatch refuses; says why.
    """
    check(
        shutil.which("sbatch") is not None,
        "--launch slurm: there is no sbatch here (is this a node of the cluster?)",
    )
    from submitit.core.utils import FailedJobError  # an extra

    # One word, which squeue shows in a column.
    name = re.sub(r"[^\w.-]", "_", root.absolute().name)
    executor = make_executor(options, root / "jobs", name, **slurm_parameters(options))
    try:
        with executor.batch():  # submitted at its end, as one array
            jobs = [submit(executor, run) for run in runs]
    except FailedJobError as error:
        raise UserError(f"sbatch refused: {str(error).strip()}") from error
    for run, job in zip(runs, jobs, strict=True):
        write_job(run.workdir, record_of(job, options, run))
        print(f"{run.title} is job {job.job_id}: {run.workdir}")
    print(f"logs are in {root / 'jobs'}; to watch: vlmae status {root}")
    return 0


LAUNCHERS: dict[str, Callable[[LaunchConfig, Sequence[LaunchedRun], Path], int]] = {
    "slurm": submit_slurm,
    "local": run_local,
}
