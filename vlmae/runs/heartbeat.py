"""Heartbeats of a run's processes in files, and a watchdog that ends a run that hangs.

Process i of a run rewrites `WORKDIR/processes/i.json` every few seconds. Other processes and
`vlmae status` read from it that the process is alive, and its phase. A process that finds another
one of its run gone ends too, since it would wait for it in its next collective.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.json_files import read_record
from vlmae.parallel.exit_codes import Preempted, before_leaving
from vlmae.runs.atomic_files import write_json
from vlmae.runs.owner import start_of
from vlmae.runs.result import record_error

FOLDER = "processes"
PERIOD_SECS = 5.0
SILENT_PERIODS = 3  # a shared file system may show a file late
LOST_SECS = 60.0  # a file server may be away for half a minute
HUNG = 70  # EX_SOFTWARE of sysexits.h

Phase = Literal["starting", "waiting for data", "compiling", "training", "evaluating", "saving"]
Ending = Literal["", "complete", "failed", "preempted"]


@dataclasses.dataclass(frozen=True)
class Beat:
    """State of one process of a run as it last wrote it; times are Unix seconds."""

    process: int
    processes: int
    host: str
    pid: int
    job: str
    """SLURM job id; "" elsewhere."""
    step: int
    phase: Phase
    phase_since: float
    written: float
    period_secs: float
    """Time between two writings."""
    ended: Ending
    """"" while it runs."""

    @property
    def who(self) -> str:
        """Name the process."""
        return f"process {self.process} of {self.processes} ({self.host}, pid {self.pid})"

    def describe(self, now: float) -> str:
        """Format one line: process, host, phase, and for how long."""
        if self.ended:
            return f"{self.who}: {self.ended} at step {self.step}"
        line = f"{self.who}: {self.phase}, step {self.step}, for {now - self.phase_since:.0f} s"
        if self.is_silent(now):
            line += f"; no sign of life for {now - self.written:.0f} s"
        return line

    def is_silent(self, now: float) -> bool:
        """Return True if a writing is overdue: the process or its machine is gone."""
        return not self.ended and now - self.written > SILENT_PERIODS * self.period_secs


def read_beats(workdir: Path) -> list[Beat]:
    """Read the heartbeats of a run's processes, by process number; [] if there is none.

    Raises:
      UserError: a file is of another format; names it.
    """
    beats = []
    for path in (workdir / FOLDER).glob("*.json"):
        beats.append(read_record(Beat, path))
    beats.sort(key=lambda beat: beat.process)
    # An earlier start may have had more processes, whose files are still there.
    return beats[: beats[0].processes] if beats else []


class Stillness:
    """Seconds since a value has changed, as far as this process has run meanwhile.

    No clock tells that: a process that was suspended for an hour has not waited for an hour.
    """

    def __init__(self, value: object = None):
        """Begin at 0 seconds."""
        self.value, self.secs = value, 0.0

    def tick(self, value: object, secs: float) -> float:
        """Count `secs` more unless the value has changed; returns the seconds so far."""
        self.secs = self.secs + secs if value == self.value else 0.0
        self.value = value
        return self.secs


class Heartbeat:
    """Context manager that writes this process's heartbeat and ends the process if it hangs.

    A process that stays in one phase for longer than `max_idle_secs` (0: no limit) ends with exit
    code HUNG. The phases of all processes go to stderr and to `error.txt`; the stack of each of its
    threads goes to stderr.
    """

    def __init__(self, workdir: Path, max_idle_secs: float):
        """Prepare the first heartbeat; entering the block writes it."""
        import jax  # `status` reads heartbeats, and need not wait seconds for it

        self.workdir, self.max_idle_secs = workdir, max_idle_secs
        # Several writings within the limit, so that a short limit in a test works like a long one.
        period = min(PERIOD_SECS, max_idle_secs / 4) if max_idle_secs else PERIOD_SECS
        now = time.time()
        self.beat = Beat(
            process=jax.process_index(),
            processes=jax.process_count(),
            host=socket.gethostname(),
            pid=os.getpid(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            step=0,
            phase="starting",
            phase_since=now,
            written=now,
            period_secs=period,
            ended="",
        )
        self.entries = 0  # phases entered so far
        # Of the other processes: writings before this start say nothing about it.
        self.before = {beat.process: beat.written for beat in _read_whole_beats(workdir)}
        self.others: dict[int, Stillness] = {}
        # A daemon, since the process must be able to end while the thread waits.
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def enter(self, phase: Phase, step: int) -> None:
        """Record that this process enters a phase; counts as progress."""
        self.entries += 1
        self.beat = dataclasses.replace(self.beat, phase=phase, step=step, phase_since=time.time())

    def within(self, phase: Phase, step: int) -> Callable[[], None]:
        """Enter a long phase; the returned function, called in between, counts as progress."""
        self.enter(phase, step)
        return functools.partial(self.enter, phase, step)

    def __enter__(self):
        """Write the first heartbeat and start the watchdog's thread."""
        (self.workdir / FOLDER).mkdir(parents=True, exist_ok=True)
        self._write()
        before_leaving.append(self._record_preempted)
        self.thread.start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_):
        """Stop the thread and record how the run ended."""
        if self.beat.processes > 1 and error_type and issubclass(error_type, RuntimeError):
            # A collective fails at once when another process is gone; the thread finds out which.
            self.thread.join((SILENT_PERIODS + 1) * self.beat.period_secs)
        preempted = error_type is not None and issubclass(error_type, Preempted)
        ended: Ending = "preempted" if preempted else "failed" if error_type else "complete"
        before_leaving.remove(self._record_preempted)
        # Joined first: the thread must not write over the last heartbeat.
        self.stopped.set()
        self.thread.join()
        self.beat = dataclasses.replace(self.beat, ended=ended)
        with contextlib.suppress(OSError):  # it must not hide the error that ends the run
            self._write()

    def _record_preempted(self) -> None:
        self.beat = dataclasses.replace(self.beat, ended="preempted")
        self._write()

    def _write(self) -> None:
        beat = dataclasses.replace(self.beat, written=time.time())
        path = self.workdir / FOLDER / f"{beat.process}.json"
        write_json(path, dataclasses.asdict(beat))  # atomically: others read it at any moment

    def _watch(self) -> None:
        period, idle, last = self.beat.period_secs, Stillness(), time.monotonic()
        while not self.stopped.wait(period):
            # A longer pause is no time in which anything could have gone on.
            tick, last = min(time.monotonic() - last, 2 * period), time.monotonic()
            with contextlib.suppress(OSError):  # a full disk is no reason to stop watching
                self._write()
            # The main thread cannot watch itself: what hangs is a collective or a read in it.
            idle_secs = idle.tick(self.entries, tick)
            if self.max_idle_secs and idle_secs > self.max_idle_secs:
                end_hung(self.workdir, self.max_idle_secs)
            if lost := self.lost_process(_read_whole_beats(self.workdir), tick):
                end_without(self.workdir, lost)

    def lost_process(self, beats: Sequence[Beat], tick: float) -> str:
        """Describe another process of this run that failed or is gone; "" if there is none.

        Args:
          beats: of all processes.
          tick: seconds since the last call.
        """
        for beat in beats:
            if beat.process == self.beat.process or beat.written == self.before.get(beat.process):
                continue
            secs = self.others.setdefault(beat.process, Stillness()).tick(beat.written, tick)
            # Its silence too: an equal process id may belong to another container of this host.
            here = beat.host == self.beat.host and secs > self.beat.period_secs
            gone = here and start_of(beat.pid) is None
            if beat.ended == "failed" or (not beat.ended and (gone or secs > LOST_SECS)):
                how = "is gone" if gone else f"is silent for {secs:.0f} s"
                return f"{beat.who} {'has failed' if beat.ended else how}"
        return ""


def _read_whole_beats(workdir: Path) -> list[Beat]:
    """Read the heartbeats, without an error for a file server that is away or a damaged file."""
    with contextlib.suppress(OSError, UserError):
        return read_beats(workdir)
    return []


def end_without(workdir: Path, lost: str) -> NoReturn:
    """Say that another process is gone and end this one at once, without cleaning up."""
    message = f"{lost}; this one ends too: the same command goes on from the last checkpoint"
    print(message, file=sys.__stderr__, flush=True)
    record_error(workdir, message + "\n")
    os._exit(HUNG)  # exit handlers would wait for the other process


def end_hung(workdir: Path, max_idle_secs: float) -> NoReturn:
    """Report all processes and end this one at once, without cleaning up.

    Exit handlers are skipped: they would wait for the collective or the thread that hangs.
    """
    # The real stderr, as a test or a progress bar may have replaced `sys.stderr`.
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    message = describe_hang(read_beats(workdir), max_idle_secs, time.time())
    print(message, file=sys.__stderr__, flush=True)
    record_error(workdir, message + "\n")
    os._exit(HUNG)  # `sys.exit` would end this thread alone


def describe_hang(beats: Sequence[Beat], max_idle_secs: float, now: float) -> str:
    """Format a line for each process and a summary as the last line, which `status` shows."""
    silent = [beat for beat in beats if beat.is_silent(now)]
    missing = ", ".join(f"process {beat.process} on {beat.host}" for beat in silent)
    reason = f"no sign of life from {missing}" if missing else "all processes are alive"
    summary = f"no progress for train.max_idle_secs={max_idle_secs:g}: {reason}"
    return "\n".join([*(beat.describe(now) for beat in beats), summary])
