"""Compiled programs on disk, which the runs of a sweep share."""

import platform
from pathlib import Path

import jax

from vlmae.parallel.malloc import may_have_accelerator


def share_programs(folder: Path) -> None:
    """Keep compiled programs in a folder, and take from it what is there.

    JAX finds a program by its text, its compiler and its devices, and keeps those that took more
    than a second. It does nothing if JAX has a folder already, by JAX_COMPILATION_CACHE_DIR.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    # A CPU program may hold instructions that the CPU of the next machine lacks.
    own = folder if may_have_accelerator() else folder / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(own.absolute()))
