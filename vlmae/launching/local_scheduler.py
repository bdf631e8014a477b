"""`--launch local`: a scheduler for this machine, in the foreground.

Jobs are submitit's local ones, so they run as under SLURM. submitit starts all jobs at once; this
module starts `max_jobs` at a time, each with GPUs of its own.
"""

import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.schema.checks import UserError, visible
from vlmae.launching.child_process import describe_exit
from vlmae.launching.job_record import write_job
from vlmae.launching.submission import LaunchConfig, LaunchedRun, make_executor, record_of, submit
from vlmae.parallel.exit_codes import PREEMPTED
from vlmae.runs.result import last_error, read_result, record_error

if TYPE_CHECKING:
    import submitit

TEN_YEARS_MIN = 10 * 365 * 24 * 60  # submitit's local executor needs a time limit
POLL_SECS = 0.5
RESEND_SECS = 10.0
COMPLETE, FAILED, PREEMPTED_RUN = "complete", "failed", "preempted"
SLURM_ONLY = (
    *("--partition", "--account", "--qos", "--time-min", "--save-secs", "--cpus-per-task"),
    *("--mem-gb", "--sbatch"),
)
Running = dict[int, tuple[LaunchedRun, "submitit.Job"]]  # by slot: a share of the GPUs


def run_local(options: LaunchConfig, runs: Sequence[LaunchedRun], root: Path) -> int:
    """Run all, `max_jobs` at a time; a preempted run is started again.

    At Ctrl-C or SIGTERM the runs save checkpoints and end.

    Args:
      options: resources; flags that only SLURM has are named and ignored.
      runs: runs that neither are complete nor run already.
      root: folder for submitit's files, in `jobs`.

    Returns:
      The exit code: 0, 1 if a run failed, 130 after Ctrl-C.
    """
    if unused := [name for name in options.given() if name in SLURM_ONLY]:
        print(f"note: not used by --launch local: {', '.join(unused)}", file=sys.stderr)
    executor = make_executor(options, root / "jobs", "local", timeout_min=TEN_YEARS_MIN)
    waiting, running = list(runs), Running()
    counts: Counter[str] = Counter()
    with interruptible():
        try:
            while waiting or running:
                # A slot is a share of the GPUs, taken by the next run when its run has ended.
                for slot in range(max(1, options.max_jobs)):
                    if waiting and slot not in running:
                        run = waiting.pop(0)
                        with interruptions_held():
                            running[slot] = run, start(executor, options, run, slot)
                for run, outcome in ended_runs(running):
                    counts[outcome] += 1
                    waiting += [run] * (outcome == PREEMPTED_RUN)
                time.sleep(POLL_SECS)
        except KeyboardInterrupt:
            interrupt(running)
    done = counts[COMPLETE] + counts[FAILED]
    left = f", {len(runs) - done} not finished" if done < len(runs) else ""
    print(f"{counts[COMPLETE]} complete, {counts[FAILED]} failed{left}", flush=True)
    return 130 if left else int(counts[FAILED] > 0)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that both end the scheduler the same way."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interruptions_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block ends.

    A job that starts in the block is in the table of running jobs by then, and so can be told to
    end. The job itself never sees Ctrl-C, which a terminal sends to every process; it gets SIGTERM.
    """
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # jobs inherit the mask
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if came:
        raise KeyboardInterrupt


def start(
    executor: "submitit.AutoExecutor", options: LaunchConfig, run: LaunchedRun, slot: int
) -> "submitit.Job":
    """Start a run with the GPUs of its slot."""
    if options.setup:
        # `exec`, so that signals reach the run and not a shell in between.
        line = " && ".join([*options.setup, 'exec "$@"'])
        run = LaunchedRun(run.title, run.workdir, ("bash", "-c", line, "bash", *run.command))
    job = submit(executor, run, gpus_of(options, slot))
    write_job(run.workdir, record_of(job, options, run))
    print(f"{run.title} starts: {run.workdir} (log: {job.task(0).paths.stdout})", flush=True)
    return job


def gpus_of(options: LaunchConfig, slot: int) -> list[str]:
    """Return the GPUs of a slot, by CUDA's numbers: its share of the visible ones."""
    first = slot * options.gpus_per_node
    own = range(first, first + options.gpus_per_node)
    # The user's choice comes first: on a shared machine only some GPUs are theirs.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else list(map(str, range(own.stop)))
    return numbers[own.start : own.stop]


def ended_runs(running: Running) -> Iterator[tuple[LaunchedRun, str]]:
    """Remove ended runs from `running`, and yield each with its outcome; prints a line for it."""
    for slot, (run, job) in list(running.items()):
        if job.done():
            del running[slot]
            outcome = outcome_of(run, job)
            if outcome == FAILED:
                error = f"{visible(last_error(run.workdir))} (log: {job.task(0).paths.stderr})"
                print(f"{run.title} failed: {error}", file=sys.stderr, flush=True)
            else:
                print(f"{run.title} {outcome}: {run.workdir}", flush=True)
            yield run, outcome


def outcome_of(run: LaunchedRun, job: "submitit.Job") -> str:
    """Return COMPLETE, PREEMPTED_RUN or FAILED; writes `error.txt` for a failed run without one."""
    codes = [code_of(job.task(i)) for i in range(job.num_tasks)]
    if PREEMPTED in codes:
        return PREEMPTED_RUN
    text = describe_exit(0) if set(codes) == {0} else "killed without a word"
    try:
        # The exit code alone is no proof that the run got to its end.
        if set(codes) == {0} and read_result(run.workdir):
            return COMPLETE
    except UserError as error:  # a damaged file of one run does not end the others
        text = str(error)
    record_error(run.workdir, f"{text}\n")
    return FAILED


def code_of(task: "submitit.Job") -> int | None:
    """Return the exit code of `run_task`; None if it failed or was killed."""
    # submitit's `result` raises for both, so it is asked only once neither is the case.
    if not task.paths.result_pickle.exists() or task.exception():
        return None
    return task.result()


def interrupt(running: Running) -> None:
    """Tell all runs to save and end, and wait for them; a second Ctrl-C stops the waiting."""
    print("\nthe runs save themselves and end; to go on: the same command", file=sys.stderr)
    jobs = [job for _, job in running.values()]
    with contextlib.suppress(KeyboardInterrupt):
        while left := [job for job in jobs if not job.done()]:
            for job in left:  # again and again: a job that just starts has no handler yet
                os.kill(int(job.job_id), signal.SIGTERM)
            wait_for(left, RESEND_SECS)


def wait_for(jobs: Sequence["submitit.Job"], secs: float) -> None:
    """Wait until all jobs have ended, at most `secs`."""
    end = time.monotonic() + secs
    while time.monotonic() < end and not all(job.done() for job in jobs):
        time.sleep(POLL_SECS)
