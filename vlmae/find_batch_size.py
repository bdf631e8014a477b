"""The largest batch that the devices hold: `python experiments/X.py --find-batch-size`.

A batch size is tried by compiling the training step for it: the compiler knows what the program
needs. Where the device says how much memory it has (a GPU), a step that should fit is also run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from data_pipelines.config import check
from data_pipelines.records import Batch
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override
from vlmae.example_batch import abstract_batch, random_batch
from vlmae.sharding import batch_shards, make_mesh, put_batch, state_shardings
from vlmae.state import TrainState
from vlmae.train import at_keep_rate, keep_rates, make_checked_mesh, make_init, make_step

GIB = 2**30
MEMINFO = Path("/proc/meminfo")


class Trial(NamedTuple):
    """What came of one batch size."""

    batch_size: int
    needed_bytes: int | None  # on each device; None if there was not even enough to compile
    fits: bool

    def describe(self, limit_bytes: int) -> str:
        """A line for the terminal."""
        line = f"batch size {self.batch_size}: {'fits' if self.fits else 'does not fit'}"
        if self.needed_bytes is None:
            return f"{line}, out of memory when it was compiled"
        ran_out = not self.fits and self.needed_bytes <= limit_bytes
        needed, limit = (f"{size / GIB:.3g}" for size in (self.needed_bytes, limit_bytes))
        return f"{line}, {'out of memory when run, ' * ran_out}needs {needed} of {limit} GiB"


def find_batch_size(config: ExperimentConfig, memory_gib: float = 0.0) -> int:
    """Finds and prints the largest `data.batch_size` of an experiment; writes nothing.

    Images and clips of several sources differ in size, and so do steps of different keep rates:
    the largest of them is tried.

    Args:
      config: the resolved experiment; its own batch size plays no part, but must be a valid one.
      memory_gib: memory of each device; 0: what it says itself, and on CPUs, which share the
        machine's, what is available there.

    Raises:
      ValueError: not even the smallest batch fits; there are several processes; the mesh does not
        fit the devices or the model.
    """
    check(jax.process_count() == 1, "--find-batch-size is for one process")
    config = at_keep_rate(config, max(keep_rates(config)))
    mesh = make_mesh(config.mesh)
    step, least = batch_sizes(config, batch_shards(mesh))
    make_checked_mesh(override(config, {"data.batch_size": least}))
    limit_bytes = int(memory_gib * GIB) or memory_limit_bytes(mesh)
    init = sharded_init(config, mesh)

    def fits(batch_size: int) -> bool:
        batch = abstract_batch(config, batch_size=batch_size)
        trial = try_batch(config, mesh, init, batch, limit_bytes)
        print(trial.describe(limit_bytes), flush=True)
        return trial.fits

    found = largest_that_fits(fits, step, least)
    check(found > 0, f"not even a batch of {least} fits into {limit_bytes / GIB:.3g} GiB a device")
    print(f"the largest batch, in multiples of {step}: --data.batch-size {found}")
    return found


def batch_sizes(config: ExperimentConfig, shards: int) -> tuple[int, int]:
    """What batch sizes are multiples of, on so many devices that share a batch, and the smallest.

    VTM that draws its negatives from a device's own rows needs two of them in each part.
    """
    step = shards * config.optim.accumulate_steps
    needs_two = config.objectives.vtm > 0 and config.objectives.vtm_scope == "local"
    return step, 2 * step if needs_two else step


def largest_that_fits(fits: Callable[[int], bool], step: int, least: int) -> int:
    """The largest multiple of `step`, from `least` on, for which `fits` is true; 0 if none is.

    By doubling and then bisection; what is larger than what does not fit is taken not to fit.
    """
    low, high = 0, least
    while fits(high):
        low, high = high, 2 * high
    while low and high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def try_batch(
    config: ExperimentConfig,
    mesh: jax.sharding.Mesh,
    init: Callable[[int], TrainState],
    batch: Batch,
    limit_bytes: int,
) -> Trial:
    """Compiles the step for a batch of these shapes, and runs it where the device has a limit."""
    state, size = jax.eval_shape(init, 0), len(batch.valid)
    needed_bytes = None
    try:
        with jax.set_mesh(mesh):
            program = make_step(config, mesh, state).lower(state, batch).compile()
            needed_bytes = program_bytes(program) + bytes_of(batch) // batch_shards(mesh)
            if needed_bytes > limit_bytes:
                return Trial(size, needed_bytes, fits=False)
            if "bytes_limit" in memory_stats(mesh):
                arrays = put_batch(random_batch(batch, config.model.text.vocab_size), mesh)
                jax.block_until_ready(program(init(config.seed), arrays))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Trial(size, needed_bytes, fits=False)
    return Trial(size, needed_bytes, fits=True)


def sharded_init(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> Callable[[int], TrainState]:
    """A function from a seed to a state that lies on the mesh; compiled when first called."""
    init = make_init(config)
    return jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init, 0), mesh))


def program_bytes(program: jax.stages.Compiled) -> int:
    """What a run of a program needs on each device: arguments, results and all between."""
    memory = program.memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def bytes_of(batch: PyTree) -> int:
    """Bytes of all arrays; beside the batch of a step the next one is on the device already."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))


def memory_stats(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """What the first device says of its memory; CPUs say nothing."""
    return mesh.devices.flat[0].memory_stats() or {}


def memory_limit_bytes(mesh: jax.sharding.Mesh) -> int:
    """The memory of a device; of a CPU's, its share of what the machine has available.

    Raises:
      ValueError: neither the device nor the operating system says.
    """
    stats = memory_stats(mesh)
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    lines = MEMINFO.read_text().splitlines() if MEMINFO.exists() else []
    available = [line for line in lines if line.startswith("MemAvailable:")]
    check(bool(available), "this machine does not say how much memory it has: give --memory-gib")
    return int(available[0].split()[1]) * 1024 // mesh.devices.size
