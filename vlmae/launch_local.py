"""`--launch local`: a scheduler of one machine, in the foreground. Its jobs are submitit's."""

import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmae.child_process import PREEMPTED, describe_exit
from vlmae.jobs import write_job
from vlmae.launch import LaunchConfig, LaunchedRun, make_executor, record_of, submit
from vlmae.result import last_error, read_result, record_error

if TYPE_CHECKING:
    import submitit

POLL_SECS = 0.5
RESEND_SECS = 10.0
COMPLETE, FAILED, AGAIN = "complete", "failed", "preempted"
Running = dict[int, tuple[LaunchedRun, "submitit.Job"]]  # by slot


def run_local(options: LaunchConfig, runs: Sequence[LaunchedRun], root: Path) -> int:
    """Runs all, `max_jobs` at a time; one that is preempted is started again.

    Ctrl-C has the runs save themselves and end.

    Returns:
      The exit code: 0, 1 if a run failed, 130 after Ctrl-C.
    """
    executor = make_executor(options, root / "jobs", "local")
    waiting, running, counts = list(runs), {}, Counter()
    with interruptible():
        try:
            while waiting or running:
                for slot in range(max(1, options.max_jobs)):
                    if waiting and slot not in running:
                        run = waiting.pop(0)
                        with interruptions_held():
                            running[slot] = run, start(executor, options, run, slot)
                for run, outcome in ended_runs(running):
                    counts[outcome] += 1
                    waiting += [run] * (outcome == AGAIN)
                time.sleep(POLL_SECS)
        except KeyboardInterrupt:
            interrupt(running)
    done = counts[COMPLETE] + counts[FAILED]
    left = f", {len(runs) - done} not finished" if done < len(runs) else ""
    print(f"{counts[COMPLETE]} complete, {counts[FAILED]} failed{left}", flush=True)
    return 130 if left else int(counts[FAILED] > 0)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM comes as KeyboardInterrupt too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interruptions_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM come when the block ends: a job that starts in it is known by then.

    What is started in it never sees Ctrl-C, which a terminal sends to all: it is told by SIGTERM.
    """
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # jobs inherit it
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
    """Starts a run with the GPUs of its slot."""
    if options.setup:
        line = " && ".join([*options.setup, 'exec "$@"'])
        run = LaunchedRun(run.title, run.workdir, ("bash", "-c", line, "bash", *run.command))
    job = submit(executor, run, gpus_of(options, slot))
    write_job(run.workdir, record_of(job, options, run))
    print(f"{run.title} starts: {run.workdir} (log: {job.task(0).paths.stdout})", flush=True)
    return job


def gpus_of(options: LaunchConfig, slot: int) -> list[str]:
    """The GPUs of a slot, by CUDA's numbers: its share of those that are visible here."""
    first = slot * options.gpus_per_node
    own = range(first, first + options.gpus_per_node)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else list(map(str, range(own.stop)))
    return numbers[own.start : own.stop]


def ended_runs(running: Running) -> Iterator[tuple[LaunchedRun, str]]:
    """Takes the runs that have ended out of `running`; prints a line for each."""
    for slot, (run, job) in list(running.items()):
        if job.done():
            del running[slot]
            outcome = outcome_of(run, job)
            if outcome == FAILED:
                error = f"{last_error(run.workdir)} (log: {job.task(0).paths.stderr})"
                print(f"{run.title} failed: {error}", file=sys.stderr, flush=True)
            else:
                print(f"{run.title} {outcome}: {run.workdir}", flush=True)
            yield run, outcome


def outcome_of(run: LaunchedRun, job: "submitit.Job") -> str:
    """COMPLETE, AGAIN or FAILED; what has failed has an `error.txt`."""
    codes = [code_of(job.task(i)) for i in range(job.num_tasks)]
    if PREEMPTED in codes:
        return AGAIN
    if set(codes) == {0} and read_result(run.workdir):
        return COMPLETE
    text = describe_exit(0) if set(codes) == {0} else "killed without a word"
    record_error(run.workdir, f"{text}\n")
    return FAILED


def code_of(task: "submitit.Job") -> int | None:
    """What `run_job` returned; None if it failed or was killed."""
    if not task.paths.result_pickle.exists() or task.exception():
        return None
    return task.result()


def interrupt(running: Running) -> None:
    """Has all runs save themselves and end, and waits for that."""
    print("\nthe runs save themselves and end; to go on: the same command", file=sys.stderr)
    jobs = [job for _, job in running.values()]
    with contextlib.suppress(KeyboardInterrupt):  # again: they end without being waited for
        while left := [job for job in jobs if not job.done()]:
            for job in left:  # more than once: one that just starts does not listen yet
                os.kill(int(job.job_id), signal.SIGTERM)
            wait_for(left, RESEND_SECS)


def wait_for(jobs: Sequence["submitit.Job"], secs: float) -> None:
    """Until all have ended, but not longer than this."""
    end = time.monotonic() + secs
    while time.monotonic() < end and not all(job.done() for job in jobs):
        time.sleep(POLL_SECS)
