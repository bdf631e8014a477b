"""How many processes must decode, so that no step waits: `--find-num-workers`.

Both sides are measured on real batches of the experiment: what a step takes on the devices, and
what one worker takes to make a batch.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from data_pipelines.config import check
from data_pipelines.records import Batch
from vlmae.config import ExperimentConfig
from vlmae.find_batch_size import sharded_init
from vlmae.sharding import put_batch
from vlmae.train import at_keep_rate, keep_rates, make_checked_mesh, make_step

MARGIN = 1.25  # workers do not all take the same time, and a machine has more to do
BATCHES = 8
MADE_AHEAD = 6  # batches of one worker at most, while nobody asked: grain's two queues, two hands


def find_num_workers(config: ExperimentConfig, batches: Iterator[Batch]) -> int:
    """Finds and prints the `data.num_workers` that an experiment needs; writes nothing.

    Of the keep rates of a schedule the least is taken, whose steps are the fastest.

    Args:
      config: the resolved experiment; its own number of workers plays no part.
      batches: training batches, made by one worker.

    Returns:
      `data.num_workers`.

    Raises:
      ValueError: there are several processes; see also `make_checked_mesh`.
    """
    check(jax.process_count() == 1, "--find-num-workers is for one process")
    make_checked_mesh(config)
    batch_secs, taken = time_worker(batches)
    step_secs = time_steps(at_keep_rate(config, min(keep_rates(config))), taken)
    workers, cores = workers_needed(batch_secs, step_secs), num_cores()
    print(f"a step takes {step_secs:.3g} s, a batch {batch_secs:.3g} s of one worker")
    if workers > cores:
        print(
            f"that is more than the {cores} core(s) of this process can do: store clips that are "
            "cheap to decode (python -m data_pipelines.prepare ... --short-side 256 --fps 8)"
        )
    print(f"to keep up, with {MARGIN - 1:.0%} to spare: --data.num-workers {workers}")
    return workers


def num_cores() -> int:
    """The processor's cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def workers_needed(batch_secs: float, step_secs: float) -> int:
    """The least number of workers that together make a batch in the time of a step."""
    return max(1, math.ceil(MARGIN * batch_secs / step_secs))


def time_worker(
    batches: Iterator[Batch], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, list[Batch]]:
    """Seconds a batch, without those that were made ahead, and the batches."""
    for _ in range(MADE_AHEAD):
        next(batches)
    start = clock()
    taken = [next(batches) for _ in range(BATCHES)]
    return (clock() - start) / BATCHES, taken


def time_steps(config: ExperimentConfig, batches: Sequence[Batch]) -> float:
    """Seconds a step over these batches, after a first time, in which it is compiled."""
    mesh = make_checked_mesh(config)
    init = sharded_init(config, mesh)
    with jax.set_mesh(mesh):
        state = init(config.seed)
        step = make_step(config, mesh, state)
        for _ in range(2):
            start = time.perf_counter()
            for batch in batches:
                state, metrics = step(state, put_batch(batch, mesh))
                jax.block_until_ready(metrics)
            secs = time.perf_counter() - start
    return secs / len(batches)
