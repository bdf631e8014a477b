"""Parquet files with the media in them, as data sets of Hugging Face are kept.

A column `video` or `image` holds {bytes, path} or bytes; the others hold texts under the names of
`entries.FIELDS`. Where `bytes` is empty, `path` names a file beside the Parquet file. One row group
at a time is read, and held in memory.
"""

import bisect
import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.media.endings import IMAGE_ENDINGS
from data_pipelines.schema.checks import MissingError, UserError, first_line
from data_pipelines.schema.records import Example
from data_pipelines.storage.builders import base
from data_pipelines.storage.builders.entries import (
    FIELDS,
    Fields,
    fields_of,
    find,
    texts_of_entry,
)
from data_pipelines.storage.builders.named import FilesBuilder
from data_pipelines.storage.tasks import Skipped, Task

_MEDIA_COLUMNS = ("video", "image", "img", "mp4", "webm", "jpg", "jpeg", "png", "webp", "media")


class Parquet(FilesBuilder):
    """A data set from Parquet files, stored under a name of yours."""

    kind = "parquet"

    def read_file(self, path: Path, fields: Fields) -> Iterator[Task | Skipped]:
        """Yield the tasks of a file."""
        return read_tasks(path, fields)

    def load(self, task: Task) -> Example | Skipped:
        """Read the media of a row."""
        try:
            media = read_media(task.path, task.start, fields_of(self.fields))
        except OSError as error:
            return Skipped(task.source, "without a readable media file", str(error))
        if media is None:
            return Skipped(task.source, "without media")
        return base.to_example(task, media)


def read_tasks(path: Path, fields: Fields = FIELDS) -> Iterator[Task | Skipped]:
    """Yield a task for each row of a file; `start` is its number. Media are not read.

    Raises:
      UserError: no Parquet file, or one without a column of media.
    """
    file = _open(str(path))
    with _damage_named(path):
        column = media_column(file.schema_arrow, path, fields)
        texts = [field.name for field in file.schema_arrow if not _is_media(field.type)]
    media_type = "image" if column in ("image", "img") or f".{column}" in IMAGE_ENDINGS else "video"
    row = 0
    # About the bytes of the media of a row, by which shards are cut. Not from the metadata of the
    # columns, as Arrow ends the process at some damage there.
    size = path.stat().st_size // max(1, file.metadata.num_rows)
    for group in range(file.num_row_groups):
        with _damage_named(path):
            # Texts alone: media are read by the workers, once.
            entries = file.read_row_group(group, columns=texts).to_pylist()
        for entry in entries:
            yield _task(path, row, size, media_type, entry, fields)
            row += 1


def _task(
    path: Path, row: int, size: int, media_type: str, entry: dict[str, Any], fields: Fields
) -> Task | Skipped:
    source = f"{path}[{row}]"
    try:
        captions, questions = texts_of_entry(entry, source, fields)
    except UserError as error:
        return Skipped(source, "with unreadable texts", str(error))
    name = find(entry, "media", fields)  # rows of one clip match each other
    match_id = str(entry[name]) if name else f"{path.stem}/{row}"
    return Task(str(path), size, media_type, captions, match_id, source, questions, (), row)


def read_media(path: str, row: int, fields: Fields = FIELDS) -> bytes | None:
    """Return the media of a row, None if it has none; the row group is kept for the next call.

    Raises:
      OSError: the file beside the Parquet file cannot be read.
    """
    ends = _row_ends(path)
    group = bisect.bisect_right(ends, row)
    first = ends[group - 1] if group else 0
    # The last group is kept: tasks come in the order of the file.
    value = _read_group(path, group, media_column(_open(path).schema_arrow, path, fields))
    item = value[row - first].as_py()
    if not isinstance(item, dict):
        return item
    # As data sets are saved that leave large files where they are.
    if item.get("bytes") is None and item.get("path"):
        return (Path(path).parent / item["path"]).read_bytes()
    return item.get("bytes")


def media_column(schema: pa.Schema, path: str | Path, fields: Fields = FIELDS) -> str:
    """Return the name of the column that holds the media.

    Raises:
      UserError: there is none, or several without a usual name.
    """
    found = [field.name for field in schema if _is_media(field.type)]
    usual = [name for name in (*fields["media"], *_MEDIA_COLUMNS) if name in found]
    # A lone column of bytes can only be the media.
    if not usual and len(found) != 1:
        raise UserError(
            f"{path}: no column of media ({{bytes, path}} or bytes) among its columns "
            f"{', '.join(schema.names)}; say which by --field media=NAME. Where media are files of "
            "their own, write a manifest (vlmae prepare manifest)"
        )
    return (usual or found)[0]


@functools.lru_cache(maxsize=1)
def read_captions(path: Path) -> Mapping[str, str]:
    """Return the captions of a Parquet file by `key`; none without such a file or columns."""
    if not path.is_file() or not {"key", "caption"} <= set(pq.read_schema(path).names):
        return {}
    columns = pq.read_table(path, columns=["key", "caption"]).to_pydict()
    pairs = zip(columns["key"], columns["caption"], strict=True)
    return {str(key): caption for key, caption in pairs if caption is not None}


def _is_media(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_media(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@functools.lru_cache(maxsize=1)
def _open(path: str) -> pq.ParquetFile:
    with _damage_named(path):
        return pq.ParquetFile(path)


@contextlib.contextmanager
def _damage_named(path: str | Path) -> Iterator[None]:
    """Raise UserError, naming the file, for what Arrow raises in the block."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file") from error
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a Parquet file ({first_line(error)})") from error


@functools.lru_cache(maxsize=1)
def _row_ends(path: str) -> list[int]:
    """Return the number of the row after each row group."""
    metadata = _open(path).metadata
    groups = range(metadata.num_row_groups)
    return list(itertools.accumulate(metadata.row_group(group).num_rows for group in groups))


@functools.lru_cache(maxsize=1)
def _read_group(path: str, group: int, column: str) -> pa.ChunkedArray:
    return _open(path).read_row_group(group, columns=[column]).column(column)
