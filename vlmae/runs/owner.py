"""One owner of a work directory at a time, on a network file system too.

`FOLDER/owner/ROLE.000007.json` names process and host of the seventh owner. A number is taken by a
hard link, which exactly one process can make, and never used again, so nothing is decided by a
file that another process may just have replaced. `flock` is not relied upon: on network file
systems it may hold on one host alone.

An owner touches its file every few seconds. It is dead if its own host has no such process (the
kernel's time of its start tells it from a later one of equal number), or if another host sees its
file untouched for `DEAD_SECS`. All times are those of the file system, so clocks may differ.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.json_files import read_record
from vlmae.parallel.exit_codes import before_leaving
from vlmae.runs.atomic_files import write_json

FOLDER = "owner"
BEAT_SECS = 5.0
DEAD_SECS = 120.0  # clients of NFS may show a time that is a minute old
TAKEN_OVER = 70  # EX_SOFTWARE of sysexits.h


class InUseError(UserError):
    """Another process works in the folder."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """Process that works in a folder."""

    host: str
    pid: int
    space: str
    """The kernel's boot and its space of process ids: within one, a pid means one process."""
    started: int
    """Start of the process in ticks of the kernel; 0 where that cannot be known."""
    command: str
    ended: bool = False

    def lives_here(self) -> bool | None:
        """Return whether the process exists; None if this process cannot see it."""
        if (self.host, self.space) != (socket.gethostname(), _process_space()):
            return None
        return start_of(self.pid) == self.started


@contextlib.contextmanager
def own(folder: Path, role: str = "run") -> Iterator[None]:
    """Own a folder within the block; it is made if need be, and removed if it stays empty.

    Args:
      folder: for example a work directory.
      role: owners of different roles do not disturb each other: a launcher and its runs.

    Raises:
      InUseError: it has an owner; names its process and host.
    """
    is_new = not folder.exists()
    path = _claim(folder / FOLDER, role)
    released = threading.Event()
    # A daemon, since the process must be able to end while the thread waits.
    thread = threading.Thread(target=_beat, args=(path, role, released), daemon=True)
    thread.start()

    def release() -> None:
        released.set()
        write_json(path, dataclasses.asdict(_this_process()) | {"ended": True})

    before_leaving.append(release)  # the next owner may be on another host, and would have to wait
    try:
        yield
    finally:
        before_leaving.remove(release)
        released.set()
        thread.join()
        with contextlib.suppress(OSError):  # the folder may be gone, or another process have come
            release()
            if is_new and [*folder.iterdir()] == [path.parent]:
                path.unlink()
                path.parent.rmdir()
                folder.rmdir()


def check_free(folder: Path, role: str = "run") -> None:
    """Raise InUseError if a folder has a living owner; does not wait for one that may be dead."""
    found = _newest(folder / FOLDER, role)
    owner = _read(found) if found else None
    if found and owner and not owner.ended and owner.lives_here():
        _refuse(folder, owner)


def _claim(folder: Path, role: str) -> Path:
    """Take the next number; waits for an owner that may have died on another host."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{role}.{secrets.token_hex(8)}.draft"
    draft.write_text(json.dumps(dataclasses.asdict(_this_process())))
    try:
        while True:
            before = _newest(folder, role)
            if before and _is_held(before, draft):
                time.sleep(BEAT_SECS)
                continue
            path = folder / f"{role}.{_number(before) + 1:06d}.json"
            if _link(draft, path):
                if before:
                    before.unlink(missing_ok=True)
                return path
    finally:
        draft.unlink(missing_ok=True)


def _is_held(path: Path, draft: Path) -> bool:
    """Return True if the owner may still live; raise InUseError if it does."""
    try:
        owner, touched = _read(path), path.stat().st_mtime
    except FileNotFoundError:  # a newer owner has removed it
        return False
    if owner and owner.ended:
        return False
    lives = owner.lives_here() if owner else None
    if lives is False:
        return False
    os.utime(draft)
    silent_secs = draft.stat().st_mtime - touched
    if owner and (lives or silent_secs < 3 * BEAT_SECS):
        _refuse(path.parent.parent, owner)
    if silent_secs >= DEAD_SECS:
        return False
    who = f"process {owner.pid} on {owner.host}" if owner else "an unknown process"
    print(
        f"{path.parent.parent}: {who} has been silent for {silent_secs:.0f} s; it counts as dead "
        f"after {DEAD_SECS:.0f} s",
        file=sys.stderr,
    )
    return True


def _refuse(folder: Path, owner: Owner) -> NoReturn:
    raise InUseError(
        f"{folder} is in use by process {owner.pid} on {owner.host} ({owner.command}): wait for "
        "it, end it, or choose another directory"
    )


def _link(draft: Path, path: Path) -> bool:
    """Give the draft a second name, unless another process has taken that."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:
        # NFS may lose the answer of a link that was made; other file systems know no links.
        if draft.stat().st_nlink == 2:
            return True
        try:
            with path.open("x") as file:
                file.write(draft.read_text())
        except FileExistsError:
            return False
    return True


def _beat(path: Path, role: str, released: threading.Event) -> None:
    """Touch the owner's file; end the process if another one has taken the folder over.

    That happens to a process that was suspended for longer than `DEAD_SECS`.
    """
    while not released.wait(BEAT_SECS):
        with contextlib.suppress(OSError):  # a file system that is away for a while
            if _number(_newest(path.parent, role)) > _number(path):
                print(f"{path.parent.parent}: another process has taken over", file=sys.__stderr__)
                os._exit(TAKEN_OVER)  # at once: whatever it wrote would mix with the other's files
            os.utime(path)


def _newest(folder: Path, role: str) -> Path | None:
    return max(folder.glob(f"{role}.*.json"), key=_number, default=None)


def _number(path: Path | None) -> int:
    return int(path.name.split(".")[-2]) if path else 0


def _read(path: Path) -> Owner | None:
    """Read an owner's file; None while it is being written, on a file system without links."""
    try:
        return read_record(Owner, path)
    except MissingError:
        raise
    except UserError:
        return None


def _this_process() -> Owner:
    command = " ".join(" ".join(sys.argv).split())[:200]  # a line, whatever the arguments hold
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, _process_space(), start_of(pid) or 0, command)


def _process_space() -> str:
    """Identify the space in which a pid means one process: containers may share a host's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return ""


def start_of(pid: int) -> int | None:
    """Return the start of a process in ticks since the kernel's; None if it does not exist."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self").exists():
            return None
        return 0 if answers(pid) else None
    state, *fields = status.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else int(fields[18])  # field 22 of proc(5); a zombie is dead


def answers(pid: int) -> bool:
    """Return True if this host has a process of this id, of whatever user."""
    try:
        os.kill(pid, 0)  # signal 0 is not sent: only the checks are made
    except ProcessLookupError:
        return False
    except PermissionError:  # the process of another user
        pass
    return True
