"""Processes of benchmarks: what they give back, how they end, and the memory they see."""

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks.own_process import (
    OwnProcess,
    in_own_process,
    peak_resident_bytes,
    resident_bytes,
)

# A program with a process of its own, whose number it prints.
PROGRAM = """
import os, time
from experiments.benchmarks.own_process import OwnProcess

if __name__ == "__main__":
    with OwnProcess(os.getpid) as process:
        print(process.call(""), flush=True)
        time.sleep(600)
"""


def test_the_peak_of_a_process_is_seen():
    def use_memory() -> None:
        # Mapped, since the C library may have as much at hand from what ran before.
        with mmap.mmap(-1, 64 * 2**20) as memory:
            np.frombuffer(memory, np.uint8).fill(1)

    before = resident_bytes()
    assert 60 < (peak_resident_bytes(use_memory) - before) / 2**20 < 80
    assert (resident_bytes() - before) / 2**20 < 10


def test_a_process_of_its_own():
    assert in_own_process(round, 2.5, 0) == 2
    assert in_own_process(os.getenv, "GIVEN", env={"GIVEN": "it"}) == "it"
    assert os.getenv("GIVEN") is None
    with pytest.raises(TypeError):
        in_own_process(round, "a")
    with OwnProcess(list, "ab") as process:
        process.call("append", "c")
        assert process.call("index", "c") == 2


def test_it_ends_with_a_killed_program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, env=env) as program:
        process = Path("/proc") / program.stdout.readline().decode().strip()
        assert process.name.isdigit() and process.exists()
        program.kill()
    end = time.monotonic() + 60
    while process.exists():
        assert time.monotonic() < end, "the process outlived its program"
        time.sleep(0.05)
