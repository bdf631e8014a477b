"""Running a sweep: a process for each run, so that none can stop the others."""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlmae.child_process import PREEMPTED, describe_exit, run_child
from vlmae.config import ExperimentConfig
from vlmae.processes import is_first
from vlmae.result import forget_error, last_error, record_error
from vlmae.sweep import COMPLETE, SweepRun, run_state


def run_all(base: ExperimentConfig, runs: Sequence[SweepRun], command: Sequence[str]) -> int:
    """Runs what is not complete, one after the other, whatever becomes of each.

    Args:
      base: the config that the runs change.
      runs: the sweep.
      command: a command line; with `--index i` it runs one.

    Returns:
      The exit code: 0, 1 if a run failed, 130 after Ctrl-C, PREEMPTED if a run was told to end.
    """
    counts = Counter()
    try:
        for run in runs:
            counts[run_or_skip(base, run, len(runs), command)] += 1
            if counts["preempted"]:  # the machine is wanted back
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
    """Runs one in its own process, unless it is complete.

    A failed run has an `error.txt`: its own traceback, or, where it could not write one, its exit
    code.

    Returns:
      COMPLETE, "already complete", "preempted" or "failed".
    """
    title = f"run {run.index} of 0 ... {total - 1}"
    if run_state(base, run) == COMPLETE:
        print(f"{title} is already complete: {run.workdir}", flush=True)
        return "already complete"
    print(f"{title}: {run.workdir}", flush=True)
    run.workdir.mkdir(parents=True, exist_ok=True)
    forget_error(run.workdir)
    code = run_child([*command, "--index", str(run.index)])
    if code == 0 and run_state(base, run) == COMPLETE:
        return COMPLETE
    if code == PREEMPTED:
        return "preempted"
    record_error(run.workdir, f"{describe_exit(code)}\n")
    print(f"{title} failed: {last_error(run.workdir)} (see error.txt there)", file=sys.stderr)
    return "failed"


@contextlib.contextmanager
def errors_recorded(workdir: Path) -> Iterator[None]:
    """Writes the traceback of what goes wrong in here to `error.txt`, if the directory exists."""
    if is_first():
        forget_error(workdir)
    try:
        yield
    except Exception:
        record_error(workdir, traceback.format_exc())
        raise
