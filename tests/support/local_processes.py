"""The tiny experiment in several processes of this machine, for tests."""

import contextlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import tiny_experiment

from vlmae.runs.metric_writer import read_metrics
from vlmae.runs.result import last_step


class Ended(NamedTuple):
    """What became of one process."""

    code: int
    out: str
    err: str


class LocalRun:
    """A work directory, and the command that trains in it; each process has its own devices."""

    def __init__(self, data_dir: Path, workdir: Path, env: dict[str, str], **flags: object):
        given = {"data.data_dir": data_dir, "workdir": workdir, **flags}
        self.workdir, self.env = workdir, env
        self.flags = [
            word for name, value in given.items() for word in (f"--{dashed(name)}", str(value))
        ]

    @contextlib.contextmanager
    def started(self, processes: int, devices: int = 1) -> Iterator[list[subprocess.Popen]]:
        """The processes; those that still run at the end of the block are killed."""
        # NPROC: on few cores, simulated devices wait for each other forever without more threads.
        env = self.env | {"NPROC": "16", "JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, tiny_experiment.__file__, *self.flags]
        if processes > 1:
            command += ["--coordinator", f"127.0.0.1:{free_port()}"]
            command += ["--num-processes", str(processes)]
        numbers = [["--process-id", str(i)] if processes > 1 else [] for i in range(processes)]
        pipe = subprocess.PIPE
        running = [
            subprocess.Popen([*command, *number], env=env, stdout=pipe, stderr=pipe, text=True)
            for number in numbers
        ]
        try:
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()

    def run(self, processes: int, devices: int = 1, code: int = 0) -> list[Ended]:
        """Runs to the end; all processes must leave with this exit code."""
        with self.started(processes, devices) as running:
            ended = [end_of(process) for process in running]
        assert [process.code for process in ended] == [code] * processes, ended
        return ended

    def step(self) -> int:
        """The last one that was logged."""
        return last_step(read_metrics(self.workdir))


def end_of(process: subprocess.Popen, timeout_secs: float = 300) -> Ended:
    out, err = process.communicate(timeout=timeout_secs)
    return Ended(process.returncode, out, err)


def wait_until(moment: Callable[[], bool], running: list[subprocess.Popen]) -> None:
    """Waits for it, or for the end of a process."""
    while not moment() and all(process.poll() is None for process in running):
        time.sleep(0.02)


def dashed(name: str) -> str:
    return name.replace("_", "-")


def free_port() -> int:
    """A port that nobody listens to, below those that the system hands out by itself."""
    while True:
        port = random.randint(20000, 30000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
