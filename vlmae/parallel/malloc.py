"""Settings of the C allocator that keep the memory of CPU steps in the process."""

import ctypes
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

# Parameters of glibc's mallopt, see its manual page.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
NEVER = -1  # as a threshold; the largest positive one, 2**31 - 1, would be only 2 GiB


def keep_freed_memory() -> None:
    """Keep freed memory in the process, which makes steps on the CPU faster (ours).

    A step's temporary arrays are one block of memory. By default the C library returns it to the
    kernel after every step, and the kernel clears each page of it again in the next. Call this
    before JAX looks for devices: later, threads have arenas of their own. It does nothing where JAX
    may use an accelerator, or if the C library is not glibc. Measured in
    `experiments/benchmarks/NOTES.md`.
    """
    on_cpu = jax.config.jax_platforms == "cpu" or not may_have_accelerator()
    # Looked up, since musl and macOS have no mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if on_cpu and mallopt:
        mallopt(ARENA_MAX, 1)  # in any other arena than the first, large blocks are always mapped
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, NEVER)


def return_freed_memory() -> None:
    """Give what is free to the kernel once: compiling and initializing leave gigabytes (ours).

    It works beside `keep_freed_memory`, and does nothing if the C library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def may_have_accelerator() -> bool:
    """Return True if a package is installed through which JAX finds devices other than the CPU."""
    # Looked up by packages: asking JAX itself would start its devices, after which it is too late.
    packages = any(find_spec(name) for name in ("jax_plugins", "libtpu"))
    return packages or bool(entry_points(group="jax_plugins"))
