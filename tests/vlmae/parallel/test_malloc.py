"""Memory that a step frees is there for the next one, without the kernel."""

import ctypes
import json
import subprocess
import sys
import types

import jax
import pytest
import tiny_experiment

from vlmae.cli import experiment as cli
from vlmae.parallel import malloc

STEPS = """
import ctypes, json, resource, sys, time
PR_SET_THP_DISABLE = 41  # so that a fault is a page of 4 KiB everywhere
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
from vlmae.parallel.malloc import keep_freed_memory
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
    time.sleep(0.05)  # a thread of XLA frees the memory, and may do so later than the step is done
    return (faults() - before) * resource.getpagesize() / 2**20

each = [cleared(jnp.ones((4096, 64))) for _ in range(9)]
print(json.dumps(min(each[4:])))
"""

LARGE = """
import ctypes
from vlmae.parallel.malloc import keep_freed_memory

keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
start = libc.sbrk(0)
block = libc.malloc(ctypes.c_size_t(3 << 30))
end = libc.sbrk(0)
libc.free(ctypes.c_void_p(block))
print(end - start > 2 << 30 and libc.sbrk(0) == end)  # some of it may have been there
"""

FREED = """
from vlmae.parallel.malloc import keep_freed_memory, return_freed_memory

def held_mib():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x[:6] == "VmRSS:") / 1024

keep_freed_memory()
blocks = [bytes(b"x") * 200_000 for _ in range(2000)]
full, blocks = held_mib(), blocks[-1:]
freed = held_mib()
return_freed_memory()
print(full - freed < 40 and full - held_mib() > 340)
"""

BROKEN = """
import time
from typing import NamedTuple
from vlmae.parallel.malloc import keep_freed_memory

keep_freed_memory()
import jax, jax.numpy as jnp, numpy as np
from vlmae.training.compiled_step import CompiledStep

class Batch(NamedTuple):
    video: jax.Array

def step(state, batch, values):
    products = jnp.tanh(batch.video @ batch.video.T)  # 256 MiB
    return state + (products @ batch.video).sum(), {}

def peak_mib():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x[:6] == "VmHWM:") / 1024

compiled = CompiledStep(jax.jit(step), notify=lambda line: None)
state, batch, kept, peaks = jnp.zeros(()), Batch(jnp.ones((8192, 8))), [], []
compiled.compile(state, batch)
for number in range(3):
    state, _ = compiled(state, batch)
    if number == 0:  # as batches that are read ahead: behind the block, and in it
        time.sleep(0.1)
        kept.append(np.ones(5 << 20))  # 40 MiB
    state.block_until_ready()
    time.sleep(0.1)  # see above
    if number == 0:
        kept.append(np.ones(5 << 20))
    peaks.append(peak_mib())
print(peaks[-1] - peaks[0])
"""


def run(program: str, *arguments: str) -> str:
    """Return what a Python program prints in a process of its own."""
    command = [sys.executable, "-c", program, *arguments]
    env = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def cleared_mib(mode: str) -> float:
    """MiB that a step takes from the kernel at least, once there were some."""
    return json.loads(run(STEPS, mode))


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_step_takes_no_new_memory_from_the_kernel():
    assert cleared_mib("keep") < 8
    assert cleared_mib("as it is") > 64, "else this test shows nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_blocks_larger_than_2_gib_stay_too():
    assert run(LARGE).strip() == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_what_is_free_can_be_given_back_once():
    assert run(FREED).strip() == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_step_whose_block_was_broken_does_not_hold_two():
    assert float(run(BROKEN)) < 100, "MiB beside the batches, of a block of 256"


@pytest.fixture
def set_here(monkeypatch) -> list[int]:
    """The parameters of mallopt that are set, in place of setting them."""
    found: list[int] = []
    library = types.SimpleNamespace(mallopt=lambda name, value: found.append(name))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return found


@pytest.mark.parametrize("found", ["libtpu", "jax_plugins", "entry point", ""])
def test_not_where_there_may_be_an_accelerator(found, set_here, monkeypatch):
    monkeypatch.setattr(malloc, "find_spec", lambda name: name == found or None)
    monkeypatch.setattr(malloc, "entry_points", lambda group: [found] * (" " in found))
    unset = types.SimpleNamespace(jax_platforms=None)
    monkeypatch.setattr(malloc, "jax", types.SimpleNamespace(config=unset))
    malloc.keep_freed_memory()
    assert bool(set_here) == (found == "")


def test_but_where_only_the_cpu_is_asked_for(set_here, monkeypatch):
    monkeypatch.setattr(malloc, "may_have_accelerator", lambda: True)
    assert jax.config.jax_platforms == "cpu"
    malloc.keep_freed_memory()
    assert malloc.TRIM_THRESHOLD in set_here


def test_training_keeps_it(monkeypatch):
    """Before anything else is done."""
    calls = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: calls.append("keep"))
    monkeypatch.setattr(cli, "run", lambda command, sweeps: calls.append("run"))
    monkeypatch.setattr(sys, "argv", ["tiny"])
    cli.main(tiny_experiment.get_config)
    assert calls == ["keep", "run"]
