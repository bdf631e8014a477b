"""Batches from prepared data sets, with grain.

Training batches are a function of (config, seed, step) alone: neither the number of worker
processes nor the step at which a run starts changes a byte of them, and the rows of a global
batch are the same however many processes share it. So the state of the data is the step.
"""

import array
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32

from data_pipelines.loading.rows import (
    PickedRecords,
    QuestionRows,
    Row,
    RowMaker,
    TrainRows,
    wrong_options,
)
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.classes import Classes
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.records import Batch
from data_pipelines.storage.open_files import raise_limit
from data_pipelines.storage.stored import open_source, read_texts, tokenizer_for
from data_pipelines.storage.texts import StoredTexts

SHARED_MEMORY = "/dev/shm"
_MAX_THREADS = 8
_BUFFERED_BATCHES = 4
_QUIET = "ignore:resource_tracker"


class BatchIterator(contextlib.AbstractContextManager):
    """Batches in a fixed order, read ahead in the background until the end or `close()`.

    Also a context manager that closes itself.
    """

    def __init__(self, arrays: grain.DatasetIterator[dict[str, np.ndarray]]):
        """Start reading ahead."""
        self._arrays: grain.DatasetIterator | None = arrays  # None once closed

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            arrays = None if self._arrays is None else next(self._arrays, None)
        except RuntimeError as error:
            _explain_full_memory(error)
            raise
        if arrays is None:
            self.close()
            raise StopIteration
        # A copy: workers hand over shared memory, which must not outlive them.
        return Batch(**{name: np.array(array) for name, array in arrays.items()})

    def close(self) -> None:
        """Stop the threads or worker processes; can be called again."""
        if self._arrays is not None:
            self._arrays.close()
            # Dropped here, because grain complains if the interpreter does it at its very end.
            self._arrays = None

    def __exit__(self, *exception) -> None:
        self.close()


def _explain_full_memory(error: RuntimeError) -> None:
    """Raise UserError if a worker died of a full shared memory, which grain calls a crash."""
    if f"exit code -{signal.SIGBUS.value}" not in str(error):
        return
    size = shutil.disk_usage(SHARED_MEMORY).total / 2**20
    raise UserError(
        f"a data worker has died for lack of shared memory: {SHARED_MEMORY}, through which batches "
        f"pass, has {size:,.0f} MiB; give the container more (docker run --shm-size=8g), or use "
        "fewer --data.num-workers (0 needs none) or a smaller --data.batch-size"
    ) from error


def train_batches(
    config: DataConfig,
    start_step: int,
    *,
    seed: int,
    classes: Classes | None = None,
    part: int = 0,
    parts: int = 1,
) -> BatchIterator:
    """Read endless training batches from `start_step` on, or one part of each (ours).

    Every process of a run reads a part of its own. `classes` are those of the config's task
    (`classes_for`).

    Each batch comes from one source, alternating by weight, so the number of frames is fixed
    within a batch. Every epoch is shuffled anew. A clip that cannot be decoded becomes a row of
    zeros with `valid` False, reported on stderr once. Call `close()` on the iterator at the end.

    Raises:
      MissingError: a data set or the tokenizer is missing.
      UserError: `parts` does not divide the batch size, or there is no such split.
    """
    rows = local_size("data.batch_size", config.batch_size, parts)
    tokenizer = tokenizer_for(config)
    numbers = classes.numbers if classes else {}
    # One seed for each source: with a common one, equal sources would be shuffled alike.
    seeds = np.random.SeedSequence(seed).generate_state(len(config.train))
    sources = [
        _endless_rows(RowMaker(source, config, tokenizer, numbers), int(source_seed))
        # Slicing whole local batches keeps the rows of a global batch contiguous.
        .batch(rows, drop_remainder=True)[part::parts]
        for source, source_seed in zip(config.train, seeds, strict=True)
    ]
    # Mixed by batches, not rows: all rows of a batch have the same number of frames.
    batches = grain.MapDataset.mix(sources, [source.weight for source in config.train])
    # Sliced, not skipped: a resumed run decodes nothing twice, and no iterator state is saved,
    # which grain would not check against another number of workers.
    return iterate(batches[start_step:], config.num_workers)


def _endless_rows(maker: RowMaker, seed: int) -> grain.MapDataset[Row]:
    source, config = maker.source, maker.config
    records = open_source(source, config.data_dir)
    if config.task in ("questions", "options"):
        dataset = grain.MapDataset.source(_question_places(maker))
        rows = QuestionRows(records, maker)
    else:
        if config.task == "captions":
            records = _captioned(records, source, config.data_dir)
        dataset = grain.MapDataset.range(len(records))
        texts = read_texts(source, config.data_dir) if config.num_others else ()
        rows = TrainRows(records, texts, maker)
    # Shuffled before repeated: each epoch gets an order of its own. The map is last, so nothing
    # decoded waits in memory.
    return dataset.seed(seed).shuffle().repeat().random_map(rows)


def _captioned(
    records: Sequence[dict], source: SourceConfig, data_dir: str
) -> Sequence[dict] | PickedRecords:
    """Return the records that have a caption, and say on stderr how many have none.

    Raises:
      UserError: none has one.
    """
    texts = read_texts(source, data_dir)
    if isinstance(texts, StoredTexts):
        missing = texts.without_captions()
    else:  # of a folder that an older version prepared
        missing = np.array([i for i, item in enumerate(texts) if not item.captions], np.int64)
    if not len(missing):
        return records
    name = f"data set {source.name!r}: split {source.split!r}"
    if len(missing) == len(records):
        raise UserError(f"{name} has no captions, so data.task must be 'questions' or 'labels'")
    print(f"{name}: left out {len(missing)} of {len(records)} without a caption", file=sys.stderr)
    return PickedRecords(records, np.delete(np.arange(len(records)), missing))


def _question_places(maker: RowMaker) -> Int32[np.ndarray, "q 2"]:
    """Index every question of a split by its record and its number in that record.

    Raises:
      UserError: there is none, or one has another number of wrong options than the config says.
    """
    source, config = maker.source, maker.config
    name = f"data set {source.name!r}: split {source.split!r}"
    # Eight bytes a question, for sets with millions of them.
    places = array.array("i")
    for record, item in enumerate(read_texts(source, config.data_dir)):
        for place, question in enumerate(item.questions):
            wrong = len(wrong_options(question))
            if config.task == "options" and wrong != config.num_others:
                raise UserError(
                    f"{name}: {item.source}: a question with {wrong} wrong options, but "
                    f"data.num_others={config.num_others}"
                )
            places.extend((record, place))
    if not places:
        raise UserError(f"{name} has no question")
    return np.array(places, np.int32).reshape(-1, 2)


def local_size(field: str, global_size: int, parts: int) -> int:
    """Return the share of one of `parts` processes.

    Raises:
      UserError: they cannot all have the same; names the field.
    """
    if global_size % parts:
        raise UserError(f"{field} = {global_size} is not divisible by {parts} processes")
    return global_size // parts


def iterate(batches: grain.MapDataset, num_workers: int) -> BatchIterator:
    """Read ahead, in threads of this process or in worker processes; the order is fixed."""
    # PyAV and Pillow release the GIL, so threads decode in parallel up to a few cores.
    if num_workers == 0:
        threads = min(_MAX_THREADS, os.cpu_count() or 1)
        options = grain.ReadOptions(threads, prefetch_buffer_size=_BUFFERED_BATCHES)
        return BatchIterator(iter(batches.to_iter_dataset(options)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl's flags
    # Batches that a worker has ready at the end are freed by multiprocessing's tracker, a process
    # that inherits this; without it, a good run ends with a warning of leaked objects.
    if _QUIET not in sys.warnoptions:
        sys.warnoptions.append(_QUIET)
    # A worker reads ahead by itself, so it needs no threads.
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    # Two batches ahead in a worker; more would fill /dev/shm, which kills workers where it is
    # small.
    options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
    return BatchIterator(iter(dataset.mp_prefetch(options, worker_init_fn=_start_worker)))


def _start_worker(worker_index: int, worker_count: int) -> None:
    """End this worker when the training process is gone, and not before.

    When that is killed, a worker would wait in memory forever. When that is told to end, by a
    signal to the whole process group, it still needs batches to come to a step it can save.
    """
    del worker_index, worker_count
    raise_limit()
    # Schedulers and terminals signal the whole group; the training process ends its workers itself.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        # At once: nobody is left to take its batches.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
