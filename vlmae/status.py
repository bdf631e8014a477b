"""All runs below a folder, live: how far, how fast, and what became of each. Only reads.

python -m vlmae.status DIR [--watch SECS]
"""

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmae.analysis import runs
from vlmae.command import run_command
from vlmae.heartbeat import Beat, read_beats
from vlmae.jobs import JOB, JobRecord, ask_queue, is_active, is_alive, is_gone, read_job

RUNNING, COMPLETE, FAILED, PREEMPTED = "running", "complete", "failed", "preempted"
QUEUED, LOST, NOT_STARTED = "queued", "lost", "not started"
STATES = (RUNNING, COMPLETE, FAILED, PREEMPTED, QUEUED, LOST, NOT_STARTED)
MARKS = {"config.json", "error.txt", JOB, "processes"}  # a run's directory has one of them
MAIN_METRICS = (  # of an evaluation: the first one that there is
    "retrieval/t2v_r1",
    "answers/accuracy",
    "multiple_choice/match_accuracy",
    "multiple_choice/mcm_accuracy",
    "labels/map",
)
HEADS = ("run", "state", "step", "done", "clips/s", "left", "loss", "metric", "seen", "")
CLEAR = "\x1b[2J\x1b[H"


@dataclass(frozen=True)
class RunStatus:
    """What can be said of a run."""

    name: str
    state: str
    """One of STATES."""
    detail: str = ""
    """What a running process does, the error of a failed run, where a lost one was."""
    step: int = 0
    steps: int = 0
    """Of the config; 0 while it is not known."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest values."""
    silent_secs: float = math.nan
    """Since the last sign of life; NaN if there was none."""

    @property
    def secs_left(self) -> float:
        """Of training, at the speed of the last log line; NaN unless it runs."""
        if self.state != RUNNING:
            return math.nan
        return (self.steps - self.step) * self.metrics.get("speed/secs_per_step", math.nan)


def status(directory: Path, watch: float = 0.0) -> None:
    """Prints a table of all runs at and below a directory, and how many are in which state.

    States: running; complete; failed (with the last line of its error); preempted (it saved itself
    and is to be started again); queued; lost (no sign of life and no process: killed without a
    word); not started.

    Args:
      directory: of a run, a sweep, or any folder above.
      watch: seconds after which the table is printed again, until Ctrl-C; 0 prints it once.

    Raises:
      ValueError: there is no such directory, or no run in it.
    """
    while True:
        text = format_table(find_statuses(directory, time.time()))
        print((CLEAR if watch and sys.stdout.isatty() else "") + text, flush=True)
        if not watch:
            return
        try:
            time.sleep(watch)
        except KeyboardInterrupt:
            return


def find_statuses(root: Path, now: float) -> list[RunStatus]:
    """The status of every run at and below a folder, by path.

    Raises:
      ValueError: there is no such folder, or no run in it.
    """
    folders = find_workdirs(root)
    queue = None
    try:
        queue = ask_queue(read_job(folder) for folder in folders)
    except ValueError as error:
        print(f"note: {error}", file=sys.stderr)
    return [run_status(folder, now, queue, root) for folder in folders]


def find_workdirs(root: Path) -> list[Path]:
    """Folders in which a run was started or is to be, by path; for errors see `find_statuses`."""
    if not root.is_dir():
        raise ValueError(f"no such directory: {root}")
    found = []
    for folder, children, files in os.walk(root):
        if MARKS & {*files, *children}:
            found.append(Path(folder))
        children[:] = set(children) - set(runs.NOT_ENTERED)
    if not found:
        raise ValueError(f"no run in or below {root}")
    return sorted(found)


def run_status(
    workdir: Path, now: float, queue: Mapping[str, str] | None = None, root: Path | None = None
) -> RunStatus:
    """What the files in a work directory say, and the processes of this host.

    Args:
      workdir: of the run.
      now: unix seconds.
      queue: SLURM's jobs and their states; None if SLURM could not be asked.
      root: the folder that the name is relative to; its parent by default.
    """
    beats = read_beats(workdir)
    if not any(is_alive(beat, now) for beat in beats):
        # A process may have ended between its last beat and the look at its pid.
        beats = read_beats(workdir)
    run = runs.read_run(workdir, root or workdir.parent)
    state, detail = judge(run, beats, read_job(workdir), queue, now)
    step = max((beat.step for beat in beats), default=0) if state == RUNNING else 0
    return RunStatus(
        name=run.name,
        state=state,
        detail=detail,
        step=step or run.step,
        steps=run.steps,
        metrics=run.metrics,
        silent_secs=min((now - beat.written for beat in beats), default=math.nan),
    )


def judge(
    run: runs.Run,
    beats: Sequence[Beat],
    record: JobRecord | None,
    queue: Mapping[str, str] | None,
    now: float,
) -> tuple[str, str]:
    """State and detail of a run: what is certain comes first."""
    job = job_state(record, queue)
    if run.state == runs.COMPLETE:
        return COMPLETE, ""
    alive = [beat for beat in beats if is_alive(beat, now)]
    if alive and not (run.error and all(is_gone(beat) for beat in alive)):
        return RUNNING, describe_processes(beats, now)
    preempted = any(beat.ended == "preempted" for beat in beats)
    if job in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"):
        return (PREEMPTED if preempted else QUEUED), f"job {record.job}: {job}"
    if run.error:
        return FAILED, run.error
    if preempted:
        return PREEMPTED, f"job {record.job}: {job}" if job else "no job waits to start it again"
    if lost := [beat for beat in beats if not beat.ended]:
        return LOST, lost[0].describe(now)
    if beats:
        return FAILED, "ended without a word"
    if job:
        return RUNNING, "starting"
    if run.steps:
        return LOST, "there is a config, but no process left a sign of life"
    if record and queue is None and record.executor == "slurm":
        return NOT_STARTED, f"job {record.job}: SLURM cannot be asked"
    return NOT_STARTED, f"job {record.job} is gone, see {record.log}" if record else ""


def job_state(record: JobRecord | None, queue: Mapping[str, str] | None) -> str:
    """SLURM's word for the state of a job that waits or runs; "" if it does neither."""
    if record is None or not is_active(record, queue or {}):
        return ""
    return queue[record.job] if record.executor == "slurm" else "RUNNING"


def describe_processes(beats: Sequence[Beat], now: float) -> str:
    """What the first process that is alive does, and which of the others are not."""
    alive = [beat for beat in beats if is_alive(beat, now)]
    text = f"{alive[0].phase} for {format_secs(now - alive[0].phase_since)}"
    gone = [beat for beat in beats if beat not in alive]
    words = [f"; process {b.process} on {b.host} {b.ended or 'is lost'}" for b in gone]
    return text + "".join(words)


def format_table(statuses: Sequence[RunStatus]) -> str:
    """One line for each run, and one with the numbers of runs by state."""
    rows = [HEADS, *map(format_row, statuses)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS) - 1)]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    counts = Counter(s.state for s in statuses)
    total = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return "\n".join([*lines, f"{len(statuses)} runs: {total}"])


def format_row(s: RunStatus) -> tuple[str, ...]:
    """The cells of a run's line."""
    metric = next((name for name in MAIN_METRICS if name in s.metrics), "")
    return (
        s.name,
        s.state,
        f"{s.step}/{s.steps}" if s.steps else "-",
        f"{100 * s.step / s.steps:.0f} %" if s.steps else "-",
        format_number(s.metrics.get("speed/clips_per_sec", math.nan), 1),
        format_secs(s.secs_left),
        format_number(s.metrics.get("loss/total", math.nan), 3),
        f"{metric} {s.metrics[metric]:.1f}" if metric else "-",
        format_secs(s.silent_secs),
        s.detail,
    )


def format_number(value: float, digits: int) -> str:
    """The number; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def format_secs(secs: float) -> str:
    """A duration by its two largest units; "-" for NaN.

    >>> [format_secs(s) for s in (7.2, 95.0, 7384.0, 200000.0)]
    ['7 s', '1 min 35 s', '2 h 3 min', '2 d 7 h']
    """
    if math.isnan(secs):
        return "-"
    whole = max(0, int(secs))
    for large, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // part} {small}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


if __name__ == "__main__":
    run_command(status)
