"""Table of all runs below a folder: state, progress, speed and newest metrics. Only reads files.

vlmae status DIR [--watch 10]
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines.schema.checks import UserError
from vlmae.launching.job_record import (
    JOB,
    JobRecord,
    ask_queue,
    is_active,
    is_alive,
    is_gone,
    read_job,
)
from vlmae.runs import summary as runs
from vlmae.runs.heartbeat import Beat, read_beats
from vlmae.runs.metric_registry import MAIN_METRICS
from vlmae.runs.tables import align

RUNNING, COMPLETE, FAILED, PREEMPTED = "running", "complete", "failed", "preempted"
QUEUED, LOST, NOT_STARTED, DAMAGED = "queued", "lost", "not started", runs.DAMAGED
STATES = (RUNNING, COMPLETE, FAILED, PREEMPTED, QUEUED, LOST, NOT_STARTED, DAMAGED)
MARKS = {"config.json", "error.txt", JOB, "processes"}  # a run's directory has one of them
HEADS = ("run", "state", "step", "done", "clips/s", "left", "loss", "metric", "seen", "")
CLEAR = "\x1b[2J\x1b[H"


@dataclass(frozen=True)
class RunStatus:
    """State and progress of a run."""

    name: str
    state: str
    """One of STATES."""
    detail: str = ""
    """Phase of a running process, error of a failed run, or last sign of a lost one."""
    step: int = 0
    steps: int = 0
    """`train.steps` of the config; 0 while it is not known."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest values by name."""
    silent_secs: float = math.nan
    """Seconds since the last heartbeat; NaN without one."""

    @property
    def secs_left(self) -> float:
        """Seconds of training left, at the speed of the last log line; NaN unless it runs."""
        if self.state != RUNNING:
            return math.nan
        return (self.steps - self.step) * self.metrics.get("speed/secs_per_step", math.nan)


def status(directory: Path, watch: float = 0.0) -> None:
    """Print a table of all runs at and below a directory, and how many are in which state.

    States: running; complete; failed (with the last line of its error); preempted (it saved a
    checkpoint and is to be started again); queued; lost (no heartbeat and no process: it was
    killed); not started; damaged (a file of the run cannot be read: names it).

    Args:
      directory: of a run, a sweep, or any folder above.
      watch: seconds after which the table is printed again, until Ctrl-C; 0 prints it once.

    Raises:
      UserError: there is no such directory, or no run in it.
    """
    files: dict[Path, runs.RunFiles] = {}  # so that a refresh reads only what is new
    # Printed anew as a whole: runs come and go between two looks.
    while True:
        text = format_table(find_statuses(directory, time.time(), files))
        print((CLEAR if watch and sys.stdout.isatty() else "") + text, flush=True)
        if not watch:
            return
        try:
            time.sleep(watch)
        except KeyboardInterrupt:
            return


def find_statuses(
    root: Path, now: float, files: dict[Path, runs.RunFiles] | None = None
) -> list[RunStatus]:
    """Return the status of every run at and below a folder, by path.

    Args:
      root: the folder.
      now: unix seconds.
      files: files of the runs from an earlier call, to which those of new runs are added.

    Raises:
      UserError: there is no such folder, or no run in it.
    """
    folders, files = runs.find_workdirs(root, MARKS), {} if files is None else files
    queue = None
    try:  # without SLURM the files still say most
        queue = ask_queue(map(_job_if_readable, folders))
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)
    files |= {folder: runs.RunFiles(folder) for folder in folders if folder not in files}
    return [run_status(folder, now, queue, root, files[folder]) for folder in folders]


def run_status(
    workdir: Path,
    now: float,
    queue: Mapping[str, str] | None = None,
    root: Path | None = None,
    files: runs.RunFiles | None = None,
) -> RunStatus:
    """Read the status of a run from its files, the queue and the processes of this host.

    Args:
      workdir: of the run.
      now: unix seconds.
      queue: SLURM's jobs and their states; None if SLURM could not be asked.
      root: the folder that the name is relative to; its parent by default.
      files: the run's, where they have been read before.
    """
    root = root or workdir.parent
    try:
        return _status(workdir, now, queue, root, files)
    except UserError as error:
        return RunStatus(runs.run_name(workdir, root), DAMAGED, detail=str(error))


def _status(
    workdir: Path,
    now: float,
    queue: Mapping[str, str] | None,
    root: Path,
    files: runs.RunFiles | None,
) -> RunStatus:
    beats = read_beats(workdir)
    if not any(is_alive(beat, now) for beat in beats):
        # A process may have ended between its last heartbeat and the look at its id.
        beats = read_beats(workdir)
    run = runs.read_run(workdir, root, files, with_cost=False)
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


def _job_if_readable(workdir: Path) -> JobRecord | None:
    try:
        return read_job(workdir)
    except UserError:  # the run's own line says so
        return None


def judge(
    run: runs.Run,
    beats: Sequence[Beat],
    record: JobRecord | None,
    queue: Mapping[str, str] | None,
    now: float,
) -> tuple[str, str]:
    """Decide state and detail of a run; the order goes from certain to uncertain evidence."""
    job = ""  # SLURM's name for the state of a job that waits or runs
    if record and is_active(record, queue or {}):
        job = queue[record.job] if queue and record.executor == "slurm" else "RUNNING"
    described = f"job {record.job}: {job}" if record and job else ""
    if run.state == runs.COMPLETE:
        return COMPLETE, ""
    if run.state == runs.DAMAGED:
        return DAMAGED, run.error
    alive = [beat for beat in beats if is_alive(beat, now)]
    # A run with an error and no process has failed, however fresh its last heartbeat is.
    if alive and not (run.error and all(is_gone(beat) for beat in alive)):
        return RUNNING, describe_processes(beats, now)
    preempted = any(beat.ended == "preempted" for beat in beats)
    # Asked before the error: a job that waits still has the `error.txt` of its last start.
    if job in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"):
        return (PREEMPTED if preempted else QUEUED), described
    if run.error:
        return FAILED, run.error
    if preempted:
        return PREEMPTED, described or "no job waits to start it again"
    if lost := [beat for beat in beats if not beat.ended]:
        return LOST, lost[0].describe(now)
    if beats:
        return FAILED, "ended without an error message"
    if job:
        return RUNNING, "starting"
    if run.steps:
        return LOST, "there is a config, but no heartbeat"
    if record and queue is None and record.executor == "slurm":
        return NOT_STARTED, f"job {record.job}: SLURM cannot be asked"
    return NOT_STARTED, f"job {record.job} is gone, see {record.log}" if record else ""


def describe_processes(beats: Sequence[Beat], now: float) -> str:
    """Describe the phase of the first process that is alive, and name the dead ones."""
    alive = [beat for beat in beats if is_alive(beat, now)]
    text = f"{alive[0].phase} for {format_secs(now - alive[0].phase_since)}"
    gone = [beat for beat in beats if beat not in alive]
    words = [f"; process {b.process} on {b.host} {b.ended or 'is lost'}" for b in gone]
    return text + "".join(words)


def format_table(statuses: Sequence[RunStatus]) -> str:
    """Format a line for each run, and one with the number of runs in each state."""
    rows = [HEADS, *map(format_row, statuses)]
    counts = Counter(s.state for s in statuses)
    total = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{align(rows)}\n{len(statuses)} runs: {total}"


def format_row(s: RunStatus) -> tuple[str, ...]:
    """Format the cells of a run's line."""
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
    """Format a number; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def format_secs(secs: float) -> str:
    """Format a duration by its two largest units; "-" for NaN.

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
