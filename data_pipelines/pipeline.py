"""From prepared data sets to batches, with grain.

Training batches are a function of (config, seed, step) alone: neither the number of worker
processes nor the step at which a run starts changes a byte of them, and the rows of a global
batch are the same however many processes share it. So the state of the data is the step.
"""

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32

from data_pipelines.classes import Classes
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.records import Batch, Questions, Texts
from data_pipelines.rows import EvalRows, QuestionRows, Row, RowMaker, TrainRows
from data_pipelines.stored import open_source, read_texts, tokenizer_for
from data_pipelines.tokenize import Tokenizer

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
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Endless training batches from `start_step` on: this process's rows of each (ours).

    `classes` are those of the config's task (`classes_for`).

    Each batch comes from one source, alternating by weight, so the number of frames is fixed
    within a batch. Every epoch is shuffled anew. A clip that cannot be decoded becomes a row of
    zeros with `valid` False, reported on stderr once. Call `close()` on the iterator at the end.

    Raises:
      FileNotFoundError: a data set or the tokenizer is missing.
      ValueError: `process_count` does not divide the batch size, or there is no such split.
    """
    local_size = _local_size("data.batch_size", config.batch_size, process_count)
    tokenizer = tokenizer_for(config)
    seeds = np.random.SeedSequence(seed).generate_state(len(config.train))
    parts = [
        _endless_rows(RowMaker(source, config, tokenizer, _numbers(classes)), int(source_seed))
        # Slicing whole local batches keeps the rows of a global batch contiguous.
        .batch(local_size, drop_remainder=True)[process_index::process_count]
        for source, source_seed in zip(config.train, seeds, strict=True)
    ]
    batches = grain.MapDataset.mix(parts, [source.weight for source in config.train])
    return _iterate(batches[start_step:], config.num_workers)


@dataclasses.dataclass(frozen=True)
class EvalData:
    """One split, every clip once and in order, and all of its captions (ours).

    `media_ids[i]` is the id of clip i; a caption of equal id in `texts` is correct for it.
    """

    num_clips: int
    media_ids: Int32[np.ndarray, " n"]
    names: tuple[str, ...]  # where each clip comes from
    texts: Texts
    questions: Questions | None  # where the task is to answer them
    classes: Classes | None
    _rows: EvalRows
    _config: DataConfig

    def batches(self, process_index: int = 0, process_count: int = 1) -> BatchIterator:
        """This process's rows of each batch; the last one is padded with `valid` False rows.

        Raises:
          ValueError: `process_count` does not divide the batch size.
        """
        size = self._config.eval_batch_size
        local_size = _local_size("data.eval_batch_size", size, process_count)
        num_rows = -(-self.num_clips // size) * size
        batches = grain.MapDataset.range(num_rows).map(self._rows).batch(local_size)
        return _iterate(batches[process_index::process_count], self._config.num_workers)


def eval_data(config: DataConfig, classes: Classes | None = None) -> EvalData:
    """The evaluation split, without randomness (ours).

    Raises:
      FileNotFoundError: the data set or the tokenizer is missing.
      ValueError: there is no such split.
    """
    records = open_source(config.eval, config.data_dir)
    stored = read_texts(config.eval, config.data_dir)
    tokenizer = tokenizer_for(config)
    media_ids = np.unique([item.match_id for item in stored], return_inverse=True)[1]
    media_ids = media_ids.astype(np.int32)

    def tokenize(of_clips: list[list[str]]) -> Texts:
        return _tokenize_texts(of_clips, media_ids, tokenizer, config.text_len)

    questions = [question for item in stored for question in item.questions]
    maker = RowMaker(
        config.eval,
        dataclasses.replace(config, num_others=0),
        tokenizer,
        _numbers(classes if config.task == "labels" else None),
    )
    return EvalData(
        num_clips=len(records),
        media_ids=media_ids,
        names=tuple(item.source for item in stored),
        texts=tokenize([list(item.captions) for item in stored]),
        questions=Questions(
            tokenize([[question.question for question in item.questions] for item in stored]),
            tuple(question.answer for question in questions),
            tuple(question.kind for question in questions),
        )
        if config.task == "questions"
        else None,
        classes=classes,
        _rows=EvalRows(records, media_ids, maker),
        _config=config,
    )


def _numbers(classes: Classes | None) -> dict[bytes, int]:
    """The number of every class, by its name as it stands in records."""
    return {name.encode(): i for i, name in enumerate(classes.names)} if classes else {}


def _endless_rows(maker: RowMaker, seed: int) -> grain.MapDataset[Row]:
    source, data_dir = maker.source, maker.config.data_dir
    records = open_source(source, data_dir)
    if maker.config.task == "questions":
        places = _question_places(source, data_dir)
        dataset, rows = grain.MapDataset.source(places), QuestionRows(records, maker)
    else:
        if maker.config.task == "captions" and not len(records[0]["captions"]):
            raise ValueError(
                f"data set {source.name!r}: split {source.split!r} has no captions, so data.task "
                "must be 'questions' or 'labels'"
            )
        dataset, rows = grain.MapDataset.source(records), TrainRows(records, maker)
    return dataset.seed(seed).shuffle().repeat().random_map(rows)


def _question_places(source: SourceConfig, data_dir: str) -> list[tuple[int, int]]:
    """Every question of a split: the places of its record and of it in the record.

    Raises:
      ValueError: there is none.
    """
    counts = [len(item.questions) for item in read_texts(source, data_dir)]
    places = [(record, i) for record, count in enumerate(counts) for i in range(count)]
    if not places:
        raise ValueError(f"data set {source.name!r}: split {source.split!r} has no question")
    return places


def _tokenize_texts(
    of_clips: list[list[str]], media_ids: np.ndarray, tokenizer: Tokenizer, text_len: int
) -> Texts:
    """All texts of all clips in one list, each with the id of its clip."""
    flat = [text for of_clip in of_clips for text in of_clip]
    counts = [len(of_clip) for of_clip in of_clips]
    ids, mask = tokenizer.encode(flat, text_len)
    return Texts(ids, mask, np.repeat(media_ids, counts), tuple(flat))


def _local_size(field: str, global_size: int, process_count: int) -> int:
    if global_size % process_count:
        raise ValueError(f"{field} = {global_size} is not divisible by {process_count} processes")
    return global_size // process_count


def _iterate(batches: grain.MapDataset, num_workers: int) -> BatchIterator:
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
    """Ends this worker when the training process is killed; it would wait in memory forever."""
    del worker_index, worker_count

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
