"""Memory that a step frees is there for the next one, without the kernel."""

import json
import subprocess
import sys

import pytest

STEPS = """
import json, resource, statistics, sys
from vlmae.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def step(x):
    products = x @ x.T  # 64 MiB, and as much again
    return ((jnp.tanh(products) @ x).T @ products).sum()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def cleared(x):
    before = faults()
    step(x).block_until_ready()
    return (faults() - before) * resource.getpagesize() / 2**20

each = [cleared(jnp.ones((4096, 64))) for _ in range(9)]
print(json.dumps(statistics.median(each[4:])))
"""

LARGE = """
import ctypes
from vlmae.host_memory import keep_freed_memory

keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
block = libc.malloc(ctypes.c_size_t(3 << 30))
end = libc.sbrk(0)
libc.free(ctypes.c_void_p(block))
print(block is not None and libc.sbrk(0) == end)
"""


def run(program: str, *arguments: str) -> str:
    """What a Python program prints in a process of its own."""
    command = [sys.executable, "-c", program, *arguments]
    env = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def cleared_mib(mode: str) -> float:
    """MiB that a step takes from the kernel, once there were some."""
    return json.loads(run(STEPS, mode))


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_step_takes_no_new_memory_from_the_kernel():
    assert cleared_mib("keep") < 8
    assert cleared_mib("as it is") > 64, "else this test shows nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_blocks_larger_than_2_gib_stay_too():
    assert run(LARGE).strip() == "True"
