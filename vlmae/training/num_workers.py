"""Search for the number of decoding workers that keeps steps from waiting: `--find-num-workers`.

Both sides are measured on real batches of the experiment: the time of a step on the devices, and
the time of one worker to make a batch.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from data_pipelines.schema.checks import check
from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ExperimentConfig
from vlmae.parallel.sharding import put_batch
from vlmae.training.step import make_checked_mesh, make_step, run_values, sharded_init

MARGIN = 1.25  # workers differ in speed, and the machine has other work
BATCHES = 8
# Batches that one worker may hold ready before the clock starts: two in each of grain's two queues
# and one in the hands of each side.
MADE_AHEAD = 6


def find_num_workers(config: ExperimentConfig, batches: Iterator[Batch]) -> int:
    """Find and print the `data.num_workers` that an experiment needs; writes nothing.

    Args:
      config: the resolved experiment, or its fastest segment; its own number of workers is not
        used.
      batches: training batches, made by one worker.

    Returns:
      `data.num_workers`.

    Raises:
      UserError: there are several processes; see also `make_checked_mesh`.
    """
    check(jax.process_count() == 1, "--find-num-workers is for one process")
    make_checked_mesh(config)
    # One after the other: together they would share the cores, and both look slower.
    batch_secs, taken = time_worker(batches)
    step_secs = time_steps(config, taken)
    workers, cores = workers_needed(batch_secs, step_secs), num_cores()
    print(f"a step takes {step_secs:.3g} s, a batch {batch_secs:.3g} s of one worker")
    if workers > cores:
        print(
            f"that is more than the {cores} core(s) of this process can do: store clips that are "
            "cheap to decode (vlmae prepare ... --store frames --short-side 224 --fps 4)"
        )
    print(f"to keep up, with {MARGIN - 1:.0%} to spare: --data.num-workers {workers}")
    return workers


def num_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def workers_needed(batch_secs: float, step_secs: float) -> int:
    """Compute the fewest workers that together make a batch in the time of a step."""
    return max(1, math.ceil(MARGIN * batch_secs / step_secs))


def time_worker(
    batches: Iterator[Batch], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, list[Batch]]:
    """Measure seconds per batch, without those made ahead; returns the batches too."""
    for _ in range(MADE_AHEAD):
        next(batches)
    start = clock()
    # Kept for the steps, so that these run on real clips at no further cost.
    taken = [next(batches) for _ in range(BATCHES)]
    return (clock() - start) / BATCHES, taken


def time_steps(config: ExperimentConfig, batches: Sequence[Batch]) -> float:
    """Measure seconds per step over these batches, after a first round that compiles it."""
    mesh = make_checked_mesh(config)
    init = sharded_init(config, mesh)
    with jax.set_mesh(mesh):
        state = init(config.seed)
        step, values = make_step(config, mesh, state), run_values(config)
        for _ in range(2):  # the first round compiles
            start = time.perf_counter()
            for batch in batches:  # transfers count too, as they do in training
                state, metrics = step(state, put_batch(batch, mesh), values)
                jax.block_until_ready(metrics)
            secs = time.perf_counter() - start
    return secs / len(batches)
