"""Prepared data sets on disk: their folders, records, texts and vocabularies."""

import bisect
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.message import DecodeError

from data_pipelines.media.reencode import Reencode
from data_pipelines.schema.checks import MissingError, UserError, check, first_line
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.json_files import read_json, to_record
from data_pipelines.storage.open_files import max_readers
from data_pipelines.storage.pictures import FRAMES, open_frames, pictures_path
from data_pipelines.storage.records import RecordTexts, damaged_record, texts_of, unpack
from data_pipelines.storage.texts import (
    Rows,
    StoredTexts,
    format_line,
    has_texts,
    texts_path,
    write_offsets,
)
from data_pipelines.text.tokenize import Tokenizer, load_tokenizer

REENCODE_KEY = "reencode"  # in the metadata of TFDS
# Texts in the `features.json` of a prepared folder: classes of TFDS, types, encodings, lengths.
_OUR_FEATURES = re.compile(
    r"[\w-]*|tensorflow_datasets\.core\.features\.\w+\.(FeaturesDict|Sequence|Text|Tensor)"
)
SHARDS_FILE = "shards.json"  # a digest of the records of each shard


class Slice(NamedTuple):
    """Records of one shard file, from `start` up to `stop`."""

    path: str
    start: int
    stop: int


class Records(Sequence[dict]):
    """The records of some slices of shard files; travels to worker processes as paths.

    ArrayRecord has checksums: a damaged record comes as `damaged_record`, never as other data. A
    process keeps the shards open that it read last, up to half of the files that it may.
    """

    def __init__(self, slices: Sequence[Slice]):
        """Open nothing yet."""
        self._slices = slices
        self._ends = list(itertools.accumulate(part.stop - part.start for part in slices))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        # Ends, not a table of all records: memory grows with shards, not clips.
        part = bisect.bisect_right(self._ends, index)
        place = int(index) - self._ends[part] + self._slices[part].stop
        path = self._slices[part].path
        try:
            [record] = _readers()(path).read([place])
            fields = unpack(record)
            if fields["media_type"] == FRAMES.encode():
                fields["media"] = open_frames(fields["media"], path)
            return fields
        except (RuntimeError, IndexError, ValueError, DecodeError) as error:
            reason = first_line(error).partition("; ")[0]
            return damaged_record(f"{path}, record {place}", reason)


@functools.cache
def _readers():
    """Return a function that opens a shard, or takes one that this process opened not long ago."""

    # A reader that falls out is closed as soon as no thread uses it any more.
    @functools.lru_cache(maxsize=max_readers())
    def open_reader(path: str) -> ArrayRecordReader:
        # No read-ahead: reads are random, and it would fetch megabytes for one clip.
        return ArrayRecordReader(
            path, options="readahead_buffer_size:0", file_reader_buffer_size=32768
        )

    return open_reader


def dataset_folder(name: str, data_dir: str | os.PathLike) -> pathlib.Path:
    """Return the folder of the newest prepared version of a data set.

    Raises:
      MissingError: it is not prepared; the message holds the command that does it.
    """
    found = newest_version(pathlib.Path(data_dir).expanduser() / name)
    if found is None:
        raise MissingError(
            f"data set {name!r} is not prepared in {data_dir}; run: "
            f"vlmae prepare {name} --data-dir {data_dir}"
        )
    return found


def is_prepared(name: str, data_dir: str | os.PathLike) -> bool:
    """Return True if there is a prepared version of a data set, of whatever options."""
    return newest_version(pathlib.Path(data_dir).expanduser() / name) is not None


def newest_version(root: pathlib.Path, at_least: str = "0") -> pathlib.Path | None:
    """Return the folder of the newest prepared version below `root`, if there is one."""
    lowest = tuple(map(int, at_least.split(".")))
    found = [file.parent for file in root.glob("*/dataset_info.json")]
    found = [folder for folder in found if parse_version(folder) >= lowest]
    # By numbers: as text 1.0.10 would come before 1.0.9.
    return max(found, key=parse_version, default=None)


def parse_version(folder: pathlib.Path) -> tuple[int, ...]:
    """Return (1, 0, 0) for a folder named 1.0.0, () for any other (say, an unfinished one)."""
    parts = folder.name.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def read_info(folder: pathlib.Path) -> tfds.core.DatasetInfo:
    """Read the metadata of a prepared folder.

    Raises:
      UserError: it is damaged, or describes its records by something that we do not write.
    """
    path = folder / "features.json"
    # TFDS imports the classes that it names, so a stranger's data set would run a stranger's code.
    for text in _texts_in(read_json(path) if path.is_file() else ()):
        check(
            bool(_OUR_FEATURES.fullmatch(text)),
            f"{path} names {text!r}, which `vlmae prepare` never writes; prepare the data set here",
        )
    try:
        return tfds.builder_from_directory(folder).info
    except Exception as error:  # damaged JSON leads TFDS and protobuf to any
        reason = first_line(error)
        raise UserError(f"{folder}: the metadata of TFDS cannot be read: {reason}") from error


def _texts_in(value: object) -> Iterator[str]:
    """Yield all texts in a JSON value but the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)


def read_form(folder: pathlib.Path) -> Reencode | None:
    """Return how the media of a prepared folder were encoded again; None: they were not.

    Raises:
      UserError: `metadata.json` is damaged.
    """
    path = folder / "metadata.json"  # of TFDS, which reads whatever JSON it holds
    metadata = read_json(path) if path.is_file() else {}
    if REENCODE_KEY not in metadata:
        return None
    return to_record(Reencode, metadata[REENCODE_KEY], path)


def read_digests(folder: pathlib.Path) -> dict[str, str]:
    """Return the digest of each shard file; empty for a folder of an older version."""
    path = folder / SHARDS_FILE
    digests = read_json(path) if path.is_file() else {}
    check(all(isinstance(x, str) for x in digests.values()), f"{path}: must hold texts")
    return digests


def open_source(source: SourceConfig, data_dir: str | os.PathLike) -> Records:
    """Open the records of a source: random access, each a dict of bytes, lists and dicts.

    Raises:
      MissingError: the data set is not prepared, or a file of it is gone.
      UserError: it has no such split, or the split is empty.
    """
    folder = dataset_folder(source.name, data_dir)
    slices, form = _slices(source, folder), read_form(folder)
    needed = [pathlib.Path(part.path) for part in slices]
    if form is not None and form.store == FRAMES:
        needed = [*needed, *map(pictures_path, needed)]
    for path in needed:  # now, and not as thousands of damaged records
        if not path.is_file():
            raise MissingError(f"{path}: no such file")
    return Records(slices)


def read_texts(source: SourceConfig, data_dir: str | os.PathLike) -> Sequence[RecordTexts]:
    """Open the texts of a source, in the order of its records.

    Those of a data set that an older version prepared are read past all of its media, unless they
    were added by `vlmae prepare`.

    Raises: as `open_source`.
    """
    folder = dataset_folder(source.name, data_dir)
    slices = _slices(source, folder)
    rows = _rows(slices, folder)
    # Old folders hold texts in the records alone, behind all media.
    if all(has_texts(folder, part.split) for part in rows):
        return StoredTexts(folder, rows)
    return [texts_of(record) for record in Records(slices)]


def has_all_texts(folder: pathlib.Path) -> bool:
    """Return True unless an older version prepared the folder, without texts beside the records."""
    return all(has_texts(folder, split) for split in read_info(folder).splits)


def write_missing_texts(folder: pathlib.Path) -> None:
    """Add the texts to a folder that an older version prepared, where it may be written."""
    for split, info in read_info(folder).splits.items():
        if has_texts(folder, split) or not os.access(folder, os.W_OK):
            continue
        slices = [Slice(str(i.filename), i.skip, i.skip + i.take) for i in info.file_instructions]
        path = texts_path(folder, split)
        with path.open("wb") as file:
            file.writelines(format_line(texts_of(record)) for record in Records(slices))
        write_offsets(path)


def source_states(config: DataConfig) -> dict[str, dict[str, int | str]]:
    """Describe each source, by name and split: what a run that goes on must find again.

    Raises: as `open_source`.
    """
    return {
        f"{source.name}/{source.split}": {
            "records": len(open_source(source, config.data_dir)),
            "form": str(read_form(dataset_folder(source.name, config.data_dir)) or "as they were"),
            "digest": fingerprint(source, config.data_dir),
        }
        for source in (*config.train, config.eval_source)
    }


def fingerprint(source: SourceConfig, data_dir: str | os.PathLike) -> str:
    """Return a hash of the records of a source: equal for copies, other for other records.

    For a data set of an older version, which holds no digests, sizes must do.

    Raises: as `open_source`.
    """
    folder = dataset_folder(source.name, data_dir)
    digests = read_digests(folder)
    content = [
        # By content and range, not by path: the same data on another disk are the same data.
        (digests.get(os.path.basename(path)) or os.path.getsize(path), start, stop)
        for path, start, stop in _slices(source, folder)
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _slices(source: SourceConfig, folder: pathlib.Path) -> list[Slice]:
    """Find the records of a split in the notation of TFDS ("train[:90%]")."""
    splits = read_info(folder).splits
    try:
        found = splits[source.split].file_instructions
        if not found:
            raise ValueError("an empty part")
    except (KeyError, ValueError) as error:
        known = ", ".join(f"{name} ({info.num_examples})" for name, info in splits.items())
        raise UserError(
            f"data set {source.name!r}: split {source.split!r} is unknown or empty; known: {known} "
            f"(see {folder})"
        ) from error
    return [Slice(str(part.filename), part.skip, part.skip + part.take) for part in found]


def _rows(slices: Sequence[Slice], folder: pathlib.Path) -> list[Rows]:
    """Find the same records in the numbering of their splits; neighbors are joined."""
    first: dict[str, tuple[str, int]] = {}  # file -> its split, and the number of its first record
    for split, info in read_info(folder).splits.items():
        ends = itertools.accumulate(info.shard_lengths)
        for path, count, end in zip(info.filepaths, info.shard_lengths, ends, strict=True):
            first[path.name] = split, end - count
    rows: list[Rows] = []
    for path, start, stop in slices:
        split, shard = first[os.path.basename(path)]
        part = Rows(split, shard + start, shard + stop)
        # Joined, so that a split of thousands of shards opens one file of texts.
        if rows and rows[-1].split == split and rows[-1].stop == part.start:
            part = Rows(split, rows.pop().start, part.stop)
        rows.append(part)
    return rows


def tokenizer_for(config: DataConfig) -> Tokenizer:
    """Return `config.tokenizer`, or the vocabulary prepared with the first training source."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    return load_tokenizer(dataset_folder(config.train[0].name, config.data_dir))
