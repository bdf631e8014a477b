"""Shards of a data set in preparation: written while reading, one at a time, by any process.

A shard becomes visible in three steps: its texts, its records, and then a mark that says what it
holds. Without the mark it is written again, so that whatever interrupts a preparation, a killed
process included, costs one shard of each worker.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import tqdm
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.media import decode, frames
from data_pipelines.media.reencode import Reencode, reencode
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.json_files import read_record
from data_pipelines.schema.records import Example
from data_pipelines.storage.builders.base import VideoTextBuilder
from data_pipelines.storage.pictures import FRAMES, pictures_path
from data_pipelines.storage.records import RecordTexts, pack
from data_pipelines.storage.tasks import Skipped, TaskList
from data_pipelines.storage.texts import format_line

# A read takes time in proportion to the records of a shard: 35 us at 1,000, 60 us at 5,000, 150 us
# at 10,000, 1.5 ms at 100,000. A clip that is decoded costs more than 5,000 of them.
MAX_RECORDS = 5000
MAX_BYTES = 256 << 20


class Shard(NamedTuple):
    """One shard of a split, among `count` of them."""

    split: str
    index: int
    count: int

    def file_name(self, dataset: str) -> str:
        """Return the name that TFDS gives to the file."""
        return f"{dataset}-{self.split}.array_record-{self.index:05d}-of-{self.count:05d}"

    @property
    def label(self) -> str:
        """Name of the files of this shard that are kept until the end of the preparation."""
        return f"{self.split}_{self.index:05d}"


@dataclasses.dataclass(frozen=True)
class Written:
    """The mark of a finished shard: what it holds, and what was left out."""

    num_records: int
    num_bytes: int
    digest: str  # of the records
    skipped: tuple[Skipped, ...]


class Workspace(NamedTuple):
    """A data set in preparation: a folder that becomes the prepared one, and one for the work."""

    folder: pathlib.Path

    @property
    def version(self) -> str:
        """Version of the data set that is prepared."""
        return self.folder.name.removeprefix("incomplete.")

    @property
    def work(self) -> pathlib.Path:
        """Files that are removed at the end."""
        return self.folder / "work"

    def mark(self, shard: Shard) -> pathlib.Path:
        """Return the file that says that a shard is finished."""
        return self.work / f"done_{shard.label}.json"

    def records(self, shard: Shard) -> pathlib.Path:
        """Return the file of a shard's records."""
        return self.work / f"records_{shard.label}"

    def texts(self, shard: Shard) -> pathlib.Path:
        """Return the file of a shard's texts."""
        return self.work / f"texts_{shard.label}.jsonl"

    def read_mark(self, shard: Shard) -> Written:
        """Read what a finished shard holds."""
        return read_record(Written, self.mark(shard))


def num_shards(num_tasks: int, num_bytes: int) -> int:
    """Return how many shards a split gets: of at most 256 MiB and 5,000 records.

    >>> num_shards(3000, 12_000_000), num_shards(12_423_374, 700 << 30), num_shards(0, 0)
    (1, 2800, 1)
    """
    return max(1, math.ceil(num_tasks / MAX_RECORDS), math.ceil(num_bytes / MAX_BYTES))


def write_shards(
    builder: VideoTextBuilder, space: Workspace, shards: Sequence[Shard], workers: int
) -> Iterator[Written]:
    """Write shards in this process, or in several; yield each as it is finished.

    Raises:
      UserError: a worker process died, say for lack of memory.
    """
    progress = tqdm.tqdm(total=len(shards), unit="shard", disable=not sys.stderr.isatty())
    with progress:
        for written in _map(builder, space, shards, min(workers, len(shards))):
            progress.update()
            yield written


def _map(
    builder: VideoTextBuilder, space: Workspace, shards: Sequence[Shard], workers: int
) -> Iterator[Written]:
    if workers <= 1:
        for shard in shards:
            yield write_shard(builder, space, shard)
        return
    # Spawned, since a fork would copy the locks of the threads that other libraries run.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=end_with_parent)
    try:
        # All at once, read as they end: a slow shard holds up no other.
        results = [pool.submit(write_shard, builder, space, shard) for shard in shards]
        for result in concurrent.futures.as_completed(results):
            yield result.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            f"{builder.name}: a worker process died (too little memory?); the same command, say "
            "with fewer --workers, goes on with what is there"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this worker process as soon as its parent is gone, killed or not."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_shard(builder: VideoTextBuilder, space: Workspace, shard: Shard) -> Written:
    """Write the records and texts of one shard, and then its mark."""
    tasks = TaskList(space.work, shard.split)
    # Shards of nearly equal size, whose bounds need no table.
    start, stop = (round(len(tasks) * i / shard.count) for i in (shard.index, shard.index + 1))
    records, texts = space.records(shard), space.texts(shard)
    skipped, num_records, num_bytes, digest = [], 0, 0, hashlib.blake2b(digest_size=16)
    form = builder.reencode
    beside = [pictures_path(records)] if form is not None and form.store == FRAMES else []
    finals = (texts, *beside, records)
    # Another process may still be dying at work on this shard: each writes files of its own.
    unfinished = [path.with_name(f"{path.name}.{os.getpid()}") for path in finals]
    with contextlib.ExitStack() as stack:
        lines, *pictures = [stack.enter_context(path.open("wb")) for path in unfinished[:-1]]
        # A group for each record: reading one must not decompress its neighbors.
        writer = ArrayRecordWriter(str(unfinished[-1]), "group_size:1")
        for task in tasks.read(start, stop):
            item = to_store(builder.load(task), form)
            if isinstance(item, Skipped):
                skipped.append(dataclasses.replace(item, split=shard.split))
                continue
            own = b""
            if pictures and item.media_type == "video":
                head, own = frames.split(item.media, pictures[0].tell())
                pictures[0].write(own)
                item = dataclasses.replace(item, media=head, media_type=FRAMES)
            record = pack(item)
            writer.write(record)
            digest.update(record + own)
            lines.write(_line(item))
            num_records, num_bytes = num_records + 1, num_bytes + len(record) + len(own)
        writer.close()
    for path, final in zip(unfinished, finals, strict=True):
        # On disk before it has its name: after a power failure a mark must not stand for an empty
        # file.
        flush(path)
        path.replace(final)
    written = Written(num_records, num_bytes, digest.hexdigest(), tuple(skipped))
    write_whole(space.mark(shard), json.dumps(dataclasses.asdict(written)))
    return written


def _line(example: Example) -> bytes:
    texts = {name: getattr(example, name) for name in RecordTexts._fields}
    return format_line(RecordTexts(**texts | {"labels": tuple(example.labels or ())}))


def check(item: Example | Skipped) -> Example | Skipped:
    """Return the example itself if it can be used, else the reason why not."""
    if isinstance(item, Skipped):
        return item
    if not (item.captions or item.questions or item.labels is not None):
        return Skipped(item.source, "without a text")
    if any(not caption.strip() for caption in item.captions):
        return Skipped(item.source, "with an empty caption")
    try:
        # Now, so that training meets hardly any bad clip.
        decode.check_media(item.media, item.media_type)
    except decode.DecodeError as error:
        return Skipped(item.source, error.reason, error.detail)
    return item


def to_store(item: Example | Skipped, setting: Reencode | None) -> Example | Skipped:
    """Return the example as it is stored, its media encoded again if wished, or why it is not."""
    item = check(item)
    if isinstance(item, Skipped):
        return item
    try:
        return dataclasses.replace(item, media=reencode(item.media, item.media_type, setting))
    except decode.DecodeError as error:
        return Skipped(item.source, error.reason, error.detail)


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, even after a power failure."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text, "utf-8")
    flush(unfinished)
    unfinished.replace(path)


def flush(path: pathlib.Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
