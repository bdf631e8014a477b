"""Processes for measurements that another one would disturb: memory, caches, timed steps."""

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Self
from unittest import mock


class OwnProcess:
    """A new process that holds an object; `call` calls the object's methods.

    Arguments and results are pickled, and errors of the process are raised here. A context manager;
    the process also ends whenever this one does.
    """

    def __init__(
        self, make: Callable[..., Any], *arguments: object, env: Mapping[str, str] | None = None
    ):
        """Make the object by `make(*arguments)`, an importable function, in environment `env`."""
        spawn = get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_with_parent)
        with mock.patch.dict(os.environ, env or {}):  # a new process has those of this one
            made = self._pool.submit(_make, make, arguments)
        try:
            made.result()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method of the object in the process, and return its result."""
        return self._pool.submit(_call, method, arguments).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()


def in_own_process(
    function: Callable[..., Any], *arguments: object, env: Mapping[str, str] | None = None
) -> Any:
    """Call a function in a new process, and return its result; see `OwnProcess`."""
    with OwnProcess(function, *arguments, env=env) as process:
        return process.call("")


def _end_with_parent() -> None:
    def wait_for_end() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


_made: list[Any] = []  # in the process of an `OwnProcess`: what was made there


def _make(make: Callable[..., Any], arguments: tuple) -> None:
    _made.append(make(*arguments))


def _call(method: str, arguments: tuple) -> Any:
    return getattr(_made[0], method)(*arguments) if method else _made[0]


def cache_in(folder: str) -> dict[str, str]:
    """Environment variables that make JAX cache every compiled program in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def resident_bytes() -> int:
    """Resident memory of this process after returning free memory (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def peak_resident_bytes(run: Callable[[], None]) -> int:
    """Measure the peak resident memory of this process during `run()` (Linux)."""
    resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    run()
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
