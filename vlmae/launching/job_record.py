"""State of a run as others see it: its `job.json`, SLURM's queue, and its heartbeats."""

import dataclasses
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.json_files import read_record
from vlmae.runs.atomic_files import write_json
from vlmae.runs.heartbeat import Beat
from vlmae.runs.owner import answers

JOB = "job.json"


@dataclass(frozen=True)
class JobRecord:
    """Launch of a run, kept as `job.json` in its work directory."""

    executor: str
    """A key of `vlmae.launching.launch.LAUNCHERS`."""
    job: str
    """Id of the job. SLURM: "12", or "12_3" in an array. Local: id of the supervising process."""
    host: str
    """Host from which it was launched."""
    log: str
    """File with the output of its first process; errors are in the same name with .err."""
    command: tuple[str, ...]
    submitted: float
    """Unix seconds."""


def write_job(workdir: Path, record: JobRecord) -> None:
    """Write `job.json`, and make the directory if need be."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / JOB, dataclasses.asdict(record))


def read_job(workdir: Path) -> JobRecord | None:
    """Read the record of the last launch; None if the run was never launched.

    Raises:
      UserError: the file is damaged, or names an unknown launcher; names the file.
    """
    path = workdir / JOB
    if not path.exists():
        return None
    record = read_record(JobRecord, path)
    # A record of a newer version may name a launcher that this one lacks.
    check(record.executor in ACTIVE, f"{path}: unknown launcher {record.executor!r}")
    return record


def ask_queue(records: Iterable[JobRecord | None]) -> dict[str, str]:
    """Ask SLURM for the states of jobs that wait or run: {"12_3": "PENDING"}.

    Jobs of other launchers are left out, and so are jobs that have ended.

    Raises:
      UserError: SLURM cannot be asked; says why.
    """
    slurm = [record.job for record in records if record and record.executor == "slurm"]
    if not slurm:
        return {}
    if shutil.which("squeue") is None:
        raise UserError("there is no squeue here, so SLURM cannot be asked about its jobs")
    # squeue fails for an unknown id only if all ids are unknown, which is no error here.
    ids = ",".join(sorted({job.split("_")[0] for job in slurm}))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={ids}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Invalid job id" in done.stderr:
        return {}
    if done.returncode:
        raise UserError(f"squeue: {done.stderr.strip()}")
    return read_queue(done.stdout)


ENDED_STATES = (  # SLURM lists ended jobs for some minutes
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
)


def read_queue(text: str) -> dict[str, str]:
    r"""Read job -> state from lines of squeue, without jobs that have ended.

    >>> read_queue("12_0 RUNNING\n12_1 FAILED\n13 PENDING\n")
    {'12_0': 'RUNNING', '13': 'PENDING'}
    """
    states = dict(line.split() for line in text.splitlines())
    return {job: state for job, state in states.items() if state not in ENDED_STATES}


def is_active(record: JobRecord | None, queue: Mapping[str, str]) -> bool:
    """Return True if the job waits or runs."""
    return record is not None and ACTIVE[record.executor](record, queue)


# Launcher -> the check whether one of its jobs waits or runs; see `launch.LAUNCHERS`.
ACTIVE: dict[str, Callable[[JobRecord, Mapping[str, str]], bool]] = {
    "slurm": lambda record, queue: record.job in queue,
    # The word in the command line, since the kernel gives ids of ended processes to new ones.
    "local": lambda record, _: (
        record.host == socket.gethostname() and process_exists(int(record.job), "submitit")
    ),
}


def process_exists(pid: int, word: str = "") -> bool:
    """Return True if this host has the process, and its command line contains the word.

    Without /proc (not on Linux), only the id is compared.
    """
    if not answers(pid):
        return False
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        return bool(command) and word in command  # a zombie has an empty command line
    except FileNotFoundError:  # no /proc, or it has ended just now
        return not Path("/proc/self").exists()


def is_alive(beat: Beat, now: float) -> bool:
    """Return True if the process of a heartbeat still runs.

    A silent process counts as alive while this host has it: it may be suspended.
    """
    here = beat.host == socket.gethostname()
    return not beat.ended and (not beat.is_silent(now) or (here and process_exists(beat.pid)))


def is_gone(beat: Beat) -> bool:
    """Return True if a process of this host is not found: it died, or is in another container."""
    # Of other hosts nothing is known but their files.
    return beat.host == socket.gethostname() and not process_exists(beat.pid)
