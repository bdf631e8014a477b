"""Running a sweep on this machine: a process for each run, so that none can stop the others."""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.schema.checks import visible
from vlmae.config.experiment import ExperimentConfig
from vlmae.launching.child_process import describe_exit, run_child
from vlmae.launching.sweep_plan import COMPLETE, SweepRun, run_state
from vlmae.parallel.exit_codes import PREEMPTED
from vlmae.parallel.processes import is_main_process
from vlmae.runs.owner import InUseError, check_free
from vlmae.runs.result import forget_error, last_error, record_error


def run_all(base: ExperimentConfig, runs: Sequence[SweepRun], command: Sequence[str]) -> int:
    """Run the incomplete runs one after the other, also after one has failed.

    Args:
      base: the config that the runs change.
      runs: the sweep.
      command: the command line of the sweep; with `--index i` it does run i alone.

    Returns:
      The exit code: 0, 1 if a run failed, 130 after Ctrl-C, PREEMPTED if a run was told to end.
    """
    counts: Counter[str] = Counter()
    try:
        for run in runs:
            counts[run_or_skip(base, run, len(runs), command)] += 1
            if counts["preempted"]:  # the scheduler wants the machine back
                break
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
    parts = [f"{counts[kind]} {kind}" for kind in ("complete", "failed", "already complete")]
    left = len(runs) - counts.total() + counts["preempted"]
    parts += [f"{left} not finished"] * (left > 0)
    print(f"sweep of {len(runs)} runs: {', '.join(parts)}", flush=True)
    if counts["preempted"]:
        return PREEMPTED
    return 130 if left else int(counts["failed"] > 0)


def run_or_skip(base: ExperimentConfig, run: SweepRun, total: int, command: Sequence[str]) -> str:
    """Run one in its own process, unless it is complete.

    A failed run gets an `error.txt`: its traceback, or its exit code if it could not write one.

    Returns:
      COMPLETE, "already complete", "preempted" or "failed".
    """
    title = f"run {run.index} of 0 ... {total - 1}"
    if run_state(base, run) == COMPLETE:
        print(f"{title} is already complete: {run.workdir}", flush=True)
        return "already complete"
    print(f"{title}: {run.workdir}", flush=True)
    try:
        check_free(run.workdir)
    except InUseError as error:
        print(f"{title} is left out: {error}", file=sys.stderr)
        return "failed"
    run.workdir.mkdir(parents=True, exist_ok=True)
    forget_error(run.workdir)
    # A process of its own: memory and compiled programs of one run are gone before the next, and a
    # crash ends one run alone.
    code = run_child([*command, "--index", str(run.index)])
    # The exit code alone is no proof: the experiment file may have changed since the sweep began.
    if code == 0 and run_state(base, run) == COMPLETE:
        return COMPLETE
    if code == PREEMPTED:
        return "preempted"
    # Does nothing if the run has left its own traceback.
    record_error(run.workdir, f"{describe_exit(code)}\n")
    reason = visible(last_error(run.workdir))
    print(f"{title} failed: {reason} (see error.txt there)", file=sys.stderr)
    return "failed"


@contextlib.contextmanager
def errors_recorded(workdir: Path) -> Iterator[None]:
    """Write the traceback of an error in the block to `error.txt`, if the directory exists.

    A directory that another process works in is left alone.
    """
    if is_main_process():
        check_free(workdir)
        forget_error(workdir)
    try:
        yield
    except InUseError:
        raise
    except Exception:
        record_error(workdir, traceback.format_exc())
        raise
