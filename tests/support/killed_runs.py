"""The tiny experiment as a command that is killed and started again."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tiny_experiment


def saving(workdir: Path) -> bool:
    """True if an unfinished checkpoint lies there: a save is under way."""
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def newest(workdir: Path) -> int:
    """Step of the newest whole checkpoint, 0 if there is none."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


class Killed:
    """Command of the tiny experiment that is killed and started again; output goes nowhere."""

    def __init__(self, data_dir: Path, workdir: Path, env: dict[str, str], **flags: object):
        given = {"data.data_dir": data_dir, "workdir": workdir, **flags}
        self.command = [sys.executable, tiny_experiment.__file__]
        for name, value in given.items():
            self.command += [f"--{name.replace('_', '-')}", str(value)]
        self.workdir, self.env = workdir, env

    def run(self) -> None:
        """Run to the end."""
        code, err = self.run_until(lambda: False, signal.SIGKILL)
        assert code == 0, err

    def run_until(self, moment: Callable[[], bool], number: int) -> tuple[int, str]:
        """Send a signal at the moment, or at none if the run ends before; returns code and stderr.

        The moment is asked for as soon as the run handles signals.
        """
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(self.command, env=self.env, **pipes) as process:
            while process.poll() is None and not handles(process.pid, signal.SIGTERM):
                time.sleep(0.001)
            while process.poll() is None and not moment():
                time.sleep(0.001)
            process.send_signal(number)
            err = process.communicate(timeout=200)[1]
        return process.returncode, err


def handles(pid: int, number: int) -> bool:
    """True if a process has a handler for a signal (proc(5))."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
