"""What every process of a run does at this moment, in files; and the end of a run that hangs.

Process i of a run rewrites `WORKDIR/processes/i.json` every few seconds, so that other processes,
and people, can see that it is alive and what it waits for.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import jax

from vlmae.files import write_whole
from vlmae.preemption import Preempted
from vlmae.result import record_error

FOLDER = "processes"
PERIOD_SECS = 5.0
SILENT_PERIODS = 3  # a shared file system may show a file late
HUNG = 70  # EX_SOFTWARE of sysexits.h

Phase = Literal["starting", "waiting for data", "compiling", "training", "evaluating", "saving"]
Ending = Literal["", "complete", "failed", "preempted"]


@dataclasses.dataclass(frozen=True)
class Beat:
    """One process of a run, as it last wrote about itself. Times are Unix seconds."""

    process: int
    processes: int
    host: str
    pid: int
    job: str
    """Of SLURM; "" elsewhere."""
    step: int
    phase: Phase
    phase_since: float
    written: float
    period_secs: float
    """Between two writings, while it is alive."""
    ended: Ending
    """"" while it runs."""

    def describe(self, now: float) -> str:
        """One line: who, where, and since when."""
        who = f"process {self.process} of {self.processes} ({self.host}, pid {self.pid})"
        if self.ended:
            return f"{who}: {self.ended} at step {self.step}"
        line = f"{who}: {self.phase}, step {self.step}, for {now - self.phase_since:.0f} s"
        if self.is_silent(now):
            line += f"; no sign of life for {now - self.written:.0f} s"
        return line

    def is_silent(self, now: float) -> bool:
        """True if it should have written again: it is dead, or its machine cannot be reached."""
        return not self.ended and now - self.written > SILENT_PERIODS * self.period_secs


def read_beats(workdir: Path) -> list[Beat]:
    """What the processes of the newest start of a run wrote, in their order; [] if none did.

    Raises:
      ValueError: a file is of another format; names it.
    """
    beats = []
    for path in (workdir / FOLDER).glob("*.json"):
        try:
            beats.append(Beat(**json.loads(path.read_text())))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    beats.sort(key=lambda beat: beat.process)
    return beats[: beats[0].processes] if beats else []


class Heartbeat:
    """Writes this process's beats, and ends the process when it makes no progress.

    A context manager. A process that stays in one phase for longer than `max_idle_secs` (0: any
    time) is ended with exit code HUNG; what all processes were doing goes to stderr and to
    `error.txt`, and where this one stands, thread by thread, to stderr.
    """

    def __init__(self, workdir: Path, max_idle_secs: float):
        self.workdir, self.max_idle_secs = workdir, max_idle_secs
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
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def enter(self, phase: Phase, step: int) -> None:
        """Notes that this process begins with something: it makes progress."""
        self.beat = dataclasses.replace(self.beat, phase=phase, step=step, phase_since=time.time())

    def within(self, phase: Phase, step: int) -> Callable[[], None]:
        """Begins with something long; what is returned is to be called when it gets on."""
        self.enter(phase, step)
        return functools.partial(self.enter, phase, step)

    def __enter__(self):
        (self.workdir / FOLDER).mkdir(parents=True, exist_ok=True)
        self._write()
        self.thread.start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_):
        preempted = error_type is not None and issubclass(error_type, Preempted)
        ended = "preempted" if preempted else "failed" if error_type else "complete"
        self.stopped.set()
        self.thread.join()
        self.beat = dataclasses.replace(self.beat, ended=ended)
        self._write()

    def _write(self) -> None:
        beat = dataclasses.replace(self.beat, written=time.time())
        text = json.dumps(dataclasses.asdict(beat), indent=2) + "\n"
        write_whole(self.workdir / FOLDER / f"{beat.process}.json", text)

    def _watch(self) -> None:
        while not self.stopped.wait(self.beat.period_secs):
            with contextlib.suppress(OSError):  # a full disk is no reason to stop watching
                self._write()
            idle = time.time() - self.beat.phase_since
            if self.max_idle_secs and idle > self.max_idle_secs:
                end_hung(self.workdir, self.max_idle_secs)


def end_hung(workdir: Path, max_idle_secs: float) -> NoReturn:
    """Says who waits where, and ends this process at once: nothing in it can be relied on."""
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    message = describe_hang(read_beats(workdir), max_idle_secs, time.time())
    print(message, file=sys.__stderr__, flush=True)
    record_error(workdir, message + "\n")
    os._exit(HUNG)


def describe_hang(beats: Sequence[Beat], max_idle_secs: float, now: float) -> str:
    """A line for each process, and last the one that a list of runs shows."""
    silent = [beat for beat in beats if beat.is_silent(now)]
    missing = ", ".join(f"process {beat.process} on {beat.host}" for beat in silent)
    reason = f"no sign of life from {missing}" if missing else "all processes are alive"
    summary = f"no progress for train.max_idle_secs={max_idle_secs:g}: {reason}"
    return "\n".join([*(beat.describe(now) for beat in beats), summary])
