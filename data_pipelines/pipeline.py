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

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.records import Batch, Texts
from data_pipelines.rows import EvalRows, Row, RowMaker, TrainRows
from data_pipelines.stored import open_source, tokenizer_for
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
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Endless training batches from `start_step` on: this process's rows of each (ours).

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
        _endless_rows(config, source, tokenizer, int(source_seed))
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


def eval_data(config: DataConfig, split: str | None = None) -> EvalData:
    """The evaluation split (or another one of the same data set), without randomness (ours).

    Raises:
      FileNotFoundError: the data set or the tokenizer is missing.
      ValueError: there is no such split.
    """
    source = dataclasses.replace(config.eval, split=split or config.eval.split)
    records = open_source(source, config.data_dir)
    tokenizer = tokenizer_for(config)
    captions, match_ids, names = [], [], []
    for record in (records[i] for i in range(len(records))):  # media are not kept
        captions.append([text.decode() for text in record["captions"]])
        match_ids.append(record["match_id"])
        names.append(record["source"].decode())
    without_others = dataclasses.replace(config, num_others=0)
    media_ids = np.unique(match_ids, return_inverse=True)[1].astype(np.int32)
    return EvalData(
        num_clips=len(records),
        media_ids=media_ids,
        names=tuple(names),
        texts=_tokenize_texts(captions, media_ids, tokenizer, config.text_len),
        _rows=EvalRows(records, media_ids, RowMaker(source, without_others, tokenizer)),
        _config=config,
    )


def _endless_rows(
    config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, seed: int
) -> grain.MapDataset[Row]:
    records = open_source(source, config.data_dir)
    rows = TrainRows(records, RowMaker(source, config, tokenizer))
    return grain.MapDataset.source(records).seed(seed).shuffle().repeat().random_map(rows)


def _tokenize_texts(
    captions: list[list[str]], media_ids: np.ndarray, tokenizer: Tokenizer, text_len: int
) -> Texts:
    """All captions of all clips in one list, each with the id of its clip."""
    flat = [caption for of_clip in captions for caption in of_clip]
    counts = [len(of_clip) for of_clip in captions]
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
