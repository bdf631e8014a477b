"""What a step on the CPU frees stays with the process, for the next step."""

import ctypes
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

# Parameters of glibc's mallopt, see its manual page.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
NEVER = -1  # as a threshold; 2**31 - 1, the most that can be given, would be 2 GiB


def keep_freed_memory() -> None:
    """Makes steps on the CPU faster: their memory is not taken from the kernel again and again.

    A step's temporary arrays are one block of memory. By default the C library gives it back after
    every step, and the kernel clears each page of it again in the next. To be called before JAX
    looks for devices: threads that already have memory of their own keep it where it is. Does
    nothing where JAX may use an accelerator, or the C library is not glibc (ours; measured in
    `experiments/benchmarks/NOTES.md`).
    """
    on_cpu = jax.config.jax_platforms == "cpu" or not may_have_accelerator()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if on_cpu and mallopt:
        mallopt(ARENA_MAX, 1)  # in other arenas than the first, large blocks are always mapped
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, NEVER)


def may_have_accelerator() -> bool:
    """Whether something is installed by which JAX finds devices other than the CPU."""
    packages = any(find_spec(name) for name in ("jax_plugins", "libtpu"))
    return packages or bool(entry_points(group="jax_plugins"))
