"""Search for the largest batch that the devices hold: `python experiments/X.py --find-batch-size`.

A batch size is tried by compiling the training step for it: the compiler knows how much memory the
program needs. That is nearly a straight line in the batch, so two small batches tell the largest
one, which is then tried itself. Where the device reports its own memory (a GPU), a step that should
fit is also run. With `--for h100` the step is compiled for a GPU that is not here.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.phases import Segment, segments
from vlmae.config.tree import override
from vlmae.parallel.sharding import (
    batch_shards,
    bytes_per_device,
    make_mesh,
    put_batch,
    state_shardings,
)
from vlmae.training.gpus import GIB, WITHOUT_MEASURING, Target, as_on, described_devices
from vlmae.training.read_ahead import AHEAD
from vlmae.training.step import (
    TrainState,
    abstract_batch,
    abstract_state,
    make_checked_mesh,
    make_step,
    random_batch,
    run_values,
    sharded_init,
)

CLOSE = 0.02  # of the answer
MEMINFO = Path("/proc/meminfo")


class Trial(NamedTuple):
    """Result of trying one batch size."""

    batch_size: int
    needed_bytes: int | None  # on each device; None if compiling ran out of memory
    fits: bool

    def describe(self, limit_bytes: int) -> str:
        """Format the trial as a line for the terminal."""
        line = f"batch size {self.batch_size}: {'fits' if self.fits else 'does not fit'}"
        if self.needed_bytes is None:
            return f"{line}, out of memory when it was compiled"
        ran_out = not self.fits and self.needed_bytes <= limit_bytes
        needed, limit = (f"{size / GIB:.3g}" for size in (self.needed_bytes, limit_bytes))
        return f"{line}, {'out of memory when run, ' * ran_out}needs {needed} of {limit} GiB"


def find_batch_size(
    config: ExperimentConfig, memory_gib: float = 0.0, target: Target | None = None
) -> int:
    """Find and print the largest `data.batch_size` of an experiment; writes nothing.

    Images and clips of several sources differ in size, and so do steps of different keep rates;
    the largest are tried.

    Args:
      config: the resolved experiment; its own batch size is not used, but must be valid.
      memory_gib: memory of each device; 0: as it reports itself, or, for CPUs, its share of the
        available memory of the machine; of a target, what JAX takes of it.
      target: GPUs to compile for, in place of the devices that are here.

    Raises:
      UserError: not even the smallest batch fits; there are several processes; the mesh does not
        fit the devices or the model.
    """
    check(jax.process_count() == 1, "--find-batch-size is for one process")
    config = max(segments(config), key=Segment.visible_patches).config  # the largest step
    devices = described_devices(target) if target else None
    mesh = make_mesh(config.mesh, devices)
    step, least = batch_sizes(config, batch_shards(mesh))
    make_checked_mesh(override(config, {"data.batch_size": least}), devices)
    # Asked for before anything is compiled: a machine that reports none fails at once.
    limit_bytes = int(memory_gib * GIB)
    limit_bytes = limit_bytes or (target.limit_bytes if target else memory_limit_bytes(mesh))
    init = sharded_init(config, mesh)

    def attempt(batch_size: int) -> Trial:
        batch = abstract_batch(config, batch_size=batch_size)
        trial = try_batch(config, mesh, init, batch, limit_bytes, target)
        print(trial.describe(limit_bytes), flush=True)
        return trial

    found = largest_that_fits(attempt, limit_bytes, step, least)
    check(found > 0, f"not even a batch of {least} fits into {limit_bytes / GIB:.3g} GiB a device")
    print(f"the largest batch, in multiples of {step}: --data.batch-size {found}")
    return found


def check_memory(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> None:
    """Check, before anything is compiled, that the devices hold what every step needs.

    That is the state, gradients of the parameters, and the batches of a step and those read ahead.
    What a step computes comes on top, and only the compiler knows it.

    Raises:
      UserError: they do not.
    """
    try:
        limit_bytes = memory_limit_bytes(mesh)
    except UserError:  # the machine does not say
        return
    state = abstract_state(config)
    shards = state_shardings(state, mesh)
    state_bytes = shard_bytes(state, shards) + shard_bytes(state.params, shards.params)
    batch_bytes = (1 + AHEAD) * bytes_per_device(abstract_batch(config), mesh)
    check(
        state_bytes + batch_bytes <= limit_bytes,
        f"--data.batch-size={config.data.batch_size}: a device has {limit_bytes / GIB:.3g} GiB of "
        f"memory; parameters, gradients and moments take {state_bytes / GIB:.3g} GiB, and "
        f"{1 + AHEAD} batches {batch_bytes / GIB:.3g} GiB; --find-batch-size finds the largest",
    )


def shard_bytes(arrays: PyTree, shardings: PyTree) -> int:
    """Sum the bytes of arrays on each device."""

    def held(x: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> int:
        return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(held, arrays, shardings)))


def batch_sizes(config: ExperimentConfig, shards: int) -> tuple[int, int]:
    """Return the step between possible batch sizes, and the smallest one.

    `shards` is the number of devices that share a batch.
    """
    step = shards * config.optim.accumulate_steps
    return step, step * config.objectives.min_rows


def largest_that_fits(
    attempt: Callable[[int], Trial], limit_bytes: int, step: int, least: int
) -> int:
    """Search the largest multiple of `step`, at least `least`, that fits; 0 if none does.

    Usually of three tries: the least; as many as fit if all its memory grew with the batch; and as
    many as the straight line through these two allows. Where the line is bent the search goes on,
    until what might still fit is less than CLOSE of the answer.
    """
    first = attempt(least)
    if not first.fits:
        return 0
    # (rows, bytes) of sizes that fit, ascending, and the smallest size that does not.
    points, bound = [(least, first.needed_bytes)], None
    guess = least * limit_bytes // max(first.needed_bytes, 1)
    while True:
        low = points[-1][0]
        size = max(guess // step * step, low + step)
        if bound is not None and size >= bound:  # the line promises what was refused
            size = (low + bound) // 2 // step * step
        if size <= low or (size - low <= CLOSE * low and len(points) > 2):
            return low
        trial = attempt(size)
        if trial.fits:
            points.append((size, trial.needed_bytes))
        else:
            bound = size
        known = points if trial.fits or trial.needed_bytes is None else [*points, trial[:2]]
        guess = largest_on_line(known[-2:], limit_bytes) if len(known) > 1 else 0
        if trial.fits and guess < size + step and len(points) > 2:
            return size


def largest_on_line(points: Sequence[tuple[int, int]], limit_bytes: int) -> int:
    """Return the rows at which the line through two points (rows, bytes) reaches the limit."""
    (left, low), (right, high) = points
    by_row = (high - low) / (right - left)
    # A flat line, as of a batch that hides behind something larger: twice as many.
    return int(left + (limit_bytes - low) / by_row) if by_row > 0 else 2 * right


def try_batch(
    config: ExperimentConfig,
    mesh: jax.sharding.Mesh,
    init: Callable[[int], TrainState],
    batch: Batch,
    limit_bytes: int,
    target: Target | None = None,
) -> Trial:
    """Compile the step for a batch of these shapes, and run it where the device reports a limit."""
    state, size = jax.eval_shape(init, 0), len(batch.valid)
    needed_bytes = None
    try:
        with jax.set_mesh(mesh), as_on(target) if target else contextlib.nullcontext():
            lowered = make_step(config, mesh, state).lower(state, batch, run_values(config))
            compiled = lowered.compile(WITHOUT_MEASURING if target else None)
            # While a step runs, the next batches are on the devices already.
            next_bytes = AHEAD * bytes_per_device(batch, mesh)
            # Known without running, so a size that cannot fit costs a compilation and no crash.
            needed_bytes = program_bytes(compiled)
            if not target and jax.default_backend() == "cpu":
                # Between two steps: a save needs as much again as the state.
                saving_bytes = 2 * shard_bytes(state, state_shardings(state, mesh))
                needed_bytes = max(needed_bytes, saving_bytes)
            needed_bytes += next_bytes
            if needed_bytes > limit_bytes:
                return Trial(size, needed_bytes, fits=False)
            # The compiler does not know what else is on the device, or how fragmented it is: only a
            # run does. A CPU would swap instead of failing.
            if not target and "bytes_limit" in memory_stats(mesh):
                arrays = put_batch(random_batch(batch, config.model.text.vocab_size), mesh)
                jax.block_until_ready(compiled(init(config.seed), arrays, run_values(config)))
    except jax.errors.JaxRuntimeError as error:  # XLA has no class of its own for this
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Trial(size, needed_bytes, fits=False)
    return Trial(size, needed_bytes, fits=True)


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Sum the bytes of a program on each device: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        # Donated arguments are results too, and count once.
        - memory.alias_size_in_bytes
    )


def memory_stats(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Read the memory statistics of this process's first device; CPUs have none."""
    return mesh.local_devices[0].memory_stats() or {}


def memory_limit_bytes(mesh: jax.sharding.Mesh) -> int:
    """Return the memory of a device; for a CPU device its share of the machine's available memory.

    Raises:
      UserError: neither the device nor the operating system reports it.
    """
    stats = memory_stats(mesh)
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    lines = MEMINFO.read_text().splitlines() if MEMINFO.exists() else []
    available = [line for line in lines if line.startswith("MemAvailable:")]
    check(bool(available), "this machine does not report its memory: give --memory-gib")
    return int(available[0].split()[1]) * 1024 // len(mesh.local_devices)
