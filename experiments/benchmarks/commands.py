"""Commands as a user gives them, in processes of their own: seconds, silence, memory, disk."""

import contextlib
import dataclasses
import errno
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmae.runs.tables import markdown_table

ROOT = Path(__file__).parents[2]
COLUMNS = {  # a field of a row: its heading, and the digits that are shown
    "secs": ("s", 0),
    "compile_secs": ("of these compiling", 0),
    "silence_secs": ("longest silence, s", 1),
    "peak_gib": ("peak GiB", 2),
    "disk_mb": ("MB on disk", 1),
}
WINDOW = (40, 120)  # rows and columns of the terminal: without a width, no bar is drawn
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, and movements of the cursor


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, and what it makes."""

    name: str
    words: tuple[str, ...]
    made: Path | None = None  # the file or folder that it writes
    kill_at: Path | None = None  # whose appearance ends it by SIGKILL


def run_step(step: Step, log_dir: Path, folder: Path, **environment: str) -> dict[str, Any]:
    """Run a command in `folder`, at a terminal of its own; keep what it prints in `log_dir`.

    Returns:
      `step` (its name), `secs` in all, `compile_secs` as the command says them (None: it compiled
      no step), `silence_secs`, the longest time between two outputs, `peak_gib` of the memory of
      its first process, and `disk_mb` of what it made.

    Raises:
      SystemExit: it failed; the end of its output is shown.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"{re.sub(r'[^0-9A-Za-z]+', '_', step.name)[:80]}.txt"
    start = time.monotonic()
    controller, terminal = pty.openpty()  # bars are drawn, and lines are not kept back
    termios.tcsetwinsize(terminal, WINDOW)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    process = subprocess.Popen(
        step.words, stdout=terminal, stderr=terminal, cwd=folder, env=environment
    )
    os.close(terminal)
    peaks = [0]

    def tick() -> None:
        # Not by getrusage, which counts what this process held when it was copied, too.
        peaks.append(_peak_bytes(process.pid))
        if step.kill_at and step.kill_at.exists():
            process.kill()

    with log.open("wb", buffering=0) as file:
        silence = _copy_output(controller, file.write, tick)
    secs, text = time.monotonic() - start, _CONTROL.sub("", log.read_text(errors="replace"))
    code = process.wait()
    if code != (-signal.SIGKILL if step.kill_at else 0):
        sys.exit(f"{step.name}: exit code {code}, see {log}\n{text[-3000:]}")
    compiled = re.findall(r"compiled the step .* in ([\d.]+) s", text)
    return {
        "step": step.name,
        "secs": secs,
        "compile_secs": sum(map(float, compiled)) if compiled else None,
        "silence_secs": silence,
        "peak_gib": max(peaks) / 2**30,
        "disk_mb": size(step.made) / 1e6 if step.made else None,
    }


def _copy_output(
    controller: int, write: Callable, tick: Callable, every_secs: float = 0.1
) -> float:
    """Copy what comes until the end; return the longest wait, the first and last included."""
    os.set_blocking(controller, False)
    last, longest = time.monotonic(), 0.0
    while True:
        tick()
        try:
            content = os.read(controller, 1 << 16)
        except BlockingIOError:
            time.sleep(every_secs)
            continue
        except OSError as error:
            if error.errno != errno.EIO:  # the other side is closed
                raise
            content = b""
        now = time.monotonic()
        last, longest = now, max(longest, now - last)
        if not content:
            os.close(controller)
            return longest
        write(content)


def _peak_bytes(pid: int) -> int:
    """Read the most memory that a process has held so far; 0 once it has ended (Linux)."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0
    return 0


def size(path: Path) -> int:
    """Count the bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [x for x in path.rglob("*") if x.is_file()]
    return sum(x.stat().st_size for x in files)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format results of `run_step`, a row each; columns without any figure are left out."""
    shown = {
        key: column for key, column in COLUMNS.items() if any(row[key] is not None for row in rows)
    }
    cells = [
        [row["step"]]
        + [
            "" if row[key] is None else f"{row[key]:.{digits}f}"
            for key, (_, digits) in shown.items()
        ]
        for row in rows
    ]
    return markdown_table([["command", *(heading for heading, _ in shown.values())], *cells])
