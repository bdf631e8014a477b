"""Compiled programs on disk, which later runs of the same shapes take from there."""

import contextlib
import platform
import time
from pathlib import Path

import jax

from vlmae.parallel.malloc import may_have_accelerator

PROGRAMS_DIR = "~/.cache/vlmae/programs"
KEPT_DAYS = 30


def keep_programs(folder: str = PROGRAMS_DIR) -> None:
    """Keep compiled programs in a folder for `KEPT_DAYS`, and take from it what is there (ours).

    JAX finds a program by its text, its compiler and its devices, and keeps those that took more
    than a second. It does nothing if JAX has a folder already, by JAX_COMPILATION_CACHE_DIR.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    own = Path(folder).expanduser()
    # A CPU program may hold instructions that the CPU of the next machine lacks.
    own = own if may_have_accelerator() else own / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(own))
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for path in own.glob("jit_*"):
        with contextlib.suppress(FileNotFoundError):  # another run has removed it
            if path.stat().st_mtime < oldest:
                path.unlink()
