"""Which config, batch and work belong to a step of the loop."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from data_pipelines.schema.config import DataConfig
from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ExperimentConfig, TrainConfig
from vlmae.config.phases import Segment
from vlmae.parallel.processes import decided_by_main

MakeBatches = Callable[[DataConfig, int, int, int], Iterator[Batch]]


class Due(NamedTuple):
    """Work that follows a step."""

    log: bool
    evaluate: bool
    save: bool


def due_after(step: int, config: TrainConfig, preempted: bool) -> Due:
    """Find what follows a step; the evaluation after the last step is not among it."""
    ends = step == config.steps or preempted
    return Due(
        log=is_due(step, config.log_every_steps) or ends,
        # A run that is told to end evaluates when it goes on: it may take hours.
        evaluate=is_due(step, config.eval_every_steps) and not ends,
        save=is_due(step, config.save_every_steps) or ends,
    )


def minutes_due(config: TrainConfig, step: int, secs: float) -> bool:
    """Return True in all processes if the main one has not saved for `save_every_minutes`.

    Args:
      config: of the loop.
      step: several processes exchange the answer, so they ask at the steps alone that they log.
      secs: since the last save.
    """
    if not config.save_every_minutes:
        return False
    if jax.process_count() > 1 and not is_due(step, config.log_every_steps):
        return False
    return decided_by_main(secs >= 60 * config.save_every_minutes)


def config_before(parts: Sequence[Segment], step: int) -> ExperimentConfig:
    """Return the config of the update that makes `step` out of `step` - 1."""
    return next(part.config for part in parts if step <= part.stop)


def segment_batches(
    parts: Sequence[Segment],
    start: int,
    make_batches: MakeBatches,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Chain the batches of all segments from step `start` on; a new data config opens new ones."""
    for data, group in itertools.groupby(parts, lambda part: part.config.data):
        stop = [part.stop for part in group][-1]
        if start < stop:
            opened = make_batches(data, start, process, processes)
            with contextlib.closing(opened) as batches:
                yield from itertools.islice(batches, stop - start)
            start = stop


def is_due(step: int, every_steps: int) -> bool:
    """Return True at multiples of `every_steps`; never if it is 0."""
    return every_steps > 0 and step % every_steps == 0
