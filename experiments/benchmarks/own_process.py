"""Measurements that need a process of their own: memory, and what a cache spares."""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def in_own_process(
    function: Callable[..., Any], *arguments: object, env: Mapping[str, str] | None = None
) -> Any:
    """What a function of a benchmark returns in a new process; all of it must be plain data.

    Args:
      function: of a module that can be imported.
      arguments: for it.
      env: environment variables to set.

    Raises:
      CalledProcessError: it failed; what it said is on stderr.
    """
    name, module = function.__name__, function.__module__
    if module == "__main__":  # of a benchmark that runs as python -m
        module = sys.modules[module].__spec__.name
    code = f"import json; from {module} import {name}; print(json.dumps({name}(*{arguments!r})))"
    command = [sys.executable, "-c", code]
    env = {**os.environ, **(env or {})}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cache_in(folder: str) -> dict[str, str]:
    """Environment variables by which JAX keeps every compiled program in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def resident_bytes() -> int:
    """Memory of this process now, after giving back what is free (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def peak_resident_bytes(run: Callable[[], None]) -> int:
    """The most memory that this process has while something runs (Linux)."""
    resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    run()
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
