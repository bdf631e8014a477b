"""What is known of a run from outside: its `job.json`, the queue, and its signs of life."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmae.files import write_whole
from vlmae.heartbeat import Beat

JOB = "job.json"


@dataclass(frozen=True)
class JobRecord:
    """How a run was launched, as `job.json` in its work directory says."""

    executor: str
    """"slurm" or "local"."""
    job: str
    """Of slurm: "12", or "12_3" in an array. Of local: the process that watches over the run."""
    host: str
    """Where it was launched."""
    log: str
    """What its first process prints; errors are in the file of the same name with .err."""
    command: tuple[str, ...]
    submitted: float
    """Unix seconds."""


def write_job(workdir: Path, record: JobRecord) -> None:
    """Writes `job.json`; makes the directory if need be."""
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(record), indent=2)
    write_whole(workdir / JOB, text + "\n")


def read_job(workdir: Path) -> JobRecord | None:
    """The record of the last launch; None if the run was never launched.

    Raises:
      ValueError: the file is no such record; names it.
    """
    path = workdir / JOB
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        return JobRecord(**values | {"command": tuple(values["command"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no record of a job: {error}") from error


def ask_queue(records: Iterable[JobRecord | None]) -> dict[str, str]:
    """The states of those of these jobs that SLURM still has: {"12_3": "PENDING"}.

    Raises:
      ValueError: SLURM cannot be asked; says why.
    """
    slurm = [record.job for record in records if record and record.executor == "slurm"]
    if not slurm:
        return {}
    if shutil.which("squeue") is None:
        raise ValueError("there is no squeue here, so SLURM cannot be asked about its jobs")
    # Of ids that it does not know, squeue takes offense only if there is nothing else.
    ids = ",".join(sorted({job.split("_")[0] for job in slurm}))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={ids}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Invalid job id" in done.stderr:
        return {}
    if done.returncode:
        raise ValueError(f"squeue: {done.stderr.strip()}")
    return read_queue(done.stdout)


ENDED_STATES = (  # of jobs that SLURM still lists for some minutes
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
)


def read_queue(text: str) -> dict[str, str]:
    """Job -> state from lines of squeue, without those that have ended.

    >>> read_queue("12_0 RUNNING\\n12_1 FAILED\\n13 PENDING\\n")
    {'12_0': 'RUNNING', '13': 'PENDING'}
    """
    states = dict(line.split() for line in text.splitlines())
    return {job: state for job, state in states.items() if state not in ENDED_STATES}


def is_active(record: JobRecord | None, queue: Mapping[str, str]) -> bool:
    """True if the job waits or runs."""
    if record is None:
        return False
    if record.executor == "slurm":
        return record.job in queue
    return record.host == socket.gethostname() and process_exists(int(record.job), "submitit")


def process_exists(pid: int, word: str = "") -> bool:
    """True if this host has such a process; one whose command holds the word, where that shows."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        return bool(command) and word in command  # a dead one that nobody waited for has none
    except FileNotFoundError:  # not on Linux, or it has ended just now
        return not Path("/proc/self").exists()


def is_alive(beat: Beat, now: float) -> bool:
    """True of a process that has not ended, by what it said or by falling silent.

    A silent one counts as alive while this host has its process: it may be suspended.
    """
    here = beat.host == socket.gethostname()
    return not beat.ended and (not beat.is_silent(now) or (here and process_exists(beat.pid)))


def is_gone(beat: Beat) -> bool:
    """True of a process of this host that is not seen: dead, or in another container."""
    return beat.host == socket.gethostname() and not process_exists(beat.pid)
