"""From prepared data sets to batches, with grain.

Training batches are a function of (config, seed, step) alone: neither the number of worker
processes nor the step at which a run starts changes a byte of them, and the rows of a global
batch are the same however many processes share it. So the state of the data is the step.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from data_pipelines.classes import Classes
from data_pipelines.config import DataConfig
from data_pipelines.records import Batch
from data_pipelines.rows import QuestionRows, Row, RowMaker, TrainRows, wrong_options
from data_pipelines.stored import open_source, read_texts, tokenizer_for

_MAX_THREADS = 8
_BUFFERED_BATCHES = 4


class BatchIterator:
    """Batches in a fixed order, read ahead in the background until the end or `close()`.

    Also a context manager that closes itself.
    """

    def __init__(self, arrays: grain.DatasetIterator[dict[str, np.ndarray]]):
        self._arrays: grain.DatasetIterator | None = arrays  # None once closed

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        arrays = None if self._arrays is None else next(self._arrays, None)
        if arrays is None:
            self.close()
            raise StopIteration
        # A copy: workers hand over shared memory, which must not outlive them.
        return Batch(**{name: np.array(array) for name, array in arrays.items()})

    def close(self) -> None:
        """Stops the threads or worker processes; can be called again."""
        if self._arrays is not None:
            self._arrays.close()
            # Dropped here, because grain complains if the interpreter does it at its very end.
            self._arrays = None

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def train_batches(
    config: DataConfig,
    start_step: int,
    *,
    seed: int,
    classes: Classes | None = None,
    part: int = 0,
    parts: int = 1,
) -> BatchIterator:
    """Endless training batches from `start_step` on, or one of several parts of each (ours).

    Every process of a run reads a part of its own.
    `classes` are those of the config's task (`classes_for`).

    Each batch comes from one source, alternating by weight, so the number of frames is fixed
    within a batch. Every epoch is shuffled anew. A clip that cannot be decoded becomes a row of
    zeros with `valid` False, reported on stderr once. Call `close()` on the iterator at the end.

    Raises:
      FileNotFoundError: a data set or the tokenizer is missing.
      ValueError: `parts` does not divide the batch size, or there is no such split.
    """
    rows = local_size("data.batch_size", config.batch_size, parts)
    tokenizer = tokenizer_for(config)
    numbers = classes.numbers if classes else {}
    seeds = np.random.SeedSequence(seed).generate_state(len(config.train))
    sources = [
        _endless_rows(RowMaker(source, config, tokenizer, numbers), int(source_seed))
        # Slicing whole local batches keeps the rows of a global batch contiguous.
        .batch(rows, drop_remainder=True)[part::parts]
        for source, source_seed in zip(config.train, seeds, strict=True)
    ]
    batches = grain.MapDataset.mix(sources, [source.weight for source in config.train])
    return iterate(batches[start_step:], config.num_workers)


def _endless_rows(maker: RowMaker, seed: int) -> grain.MapDataset[Row]:
    source, data_dir = maker.source, maker.config.data_dir
    records = open_source(source, data_dir)
    if maker.config.task in ("questions", "options"):
        places = _question_places(maker)
        dataset, rows = grain.MapDataset.source(places), QuestionRows(records, maker)
    else:
        if maker.config.task == "captions" and not len(records[0]["captions"]):
            raise ValueError(
                f"data set {source.name!r}: split {source.split!r} has no captions, so data.task "
                "must be 'questions' or 'labels'"
            )
        dataset, rows = grain.MapDataset.source(records), TrainRows(records, maker)
    return dataset.seed(seed).shuffle().repeat().random_map(rows)


def _question_places(maker: RowMaker) -> list[tuple[int, int]]:
    """Every question of a split: the places of its record and of it in the record.

    Raises:
      ValueError: there is none, or one has another number of wrong options than the config says.
    """
    source, config = maker.source, maker.config
    name = f"data set {source.name!r}: split {source.split!r}"
    places = []
    for record, item in enumerate(read_texts(source, config.data_dir)):
        for place, question in enumerate(item.questions):
            wrong = len(wrong_options(question))
            if config.task == "options" and wrong != config.num_others:
                raise ValueError(
                    f"{name}: {item.source}: a question with {wrong} wrong options, but "
                    f"data.num_others={config.num_others}"
                )
            places.append((record, place))
    if not places:
        raise ValueError(f"{name} has no question")
    return places


def local_size(field: str, global_size: int, parts: int) -> int:
    """The share of one of `parts` processes.

    Raises:
      ValueError: they cannot all have the same; names the field.
    """
    if global_size % parts:
        raise ValueError(f"{field} = {global_size} is not divisible by {parts} processes")
    return global_size // parts


def iterate(batches: grain.MapDataset, num_workers: int) -> BatchIterator:
    """Reads ahead, in threads of this process or in worker processes; the order is fixed."""
    if num_workers == 0:
        threads = min(_MAX_THREADS, os.cpu_count() or 1)
        options = grain.ReadOptions(threads, prefetch_buffer_size=_BUFFERED_BATCHES)
        return BatchIterator(iter(batches.to_iter_dataset(options)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl's flags
    # A worker reads ahead by itself, so it needs no threads.
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
    return BatchIterator(iter(dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)))


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    """Ends this worker when the training process is gone, and not before.

    When that is killed, a worker would wait in memory forever. When that is told to end, by a
    signal to the whole process group, it still needs batches to come to a step it can save.
    """
    del worker_index, worker_count
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
