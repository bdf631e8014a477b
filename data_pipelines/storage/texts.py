"""Texts beside the records: a line of JSON for each, found by its offset, without any media.

`texts_SPLIT.jsonl` holds the lines in the order of the records, `texts_SPLIT.npy` where each begins
(and, last, the size of the file). Both are memory-mapped: reading one line touches a page or two,
however large the split, and processes of one machine share these.
"""

import bisect
import functools
import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.json_files import parse_json
from data_pipelines.schema.records import Question
from data_pipelines.storage.records import RecordTexts


class Rows(NamedTuple):
    """Records of one split, from `start` up to `stop`."""

    split: str
    start: int
    stop: int


class StoredTexts(Sequence[RecordTexts]):
    """The texts of some rows of a prepared folder; travels to worker processes as paths."""

    def __init__(self, folder: pathlib.Path, rows: Sequence[Rows]):
        """Read nothing yet."""
        self._folder, self._rows = folder, rows
        self._ends = list(itertools.accumulate(part.stop - part.start for part in rows))

    def __reduce__(self):
        # A worker maps the files itself and shares their pages.
        return StoredTexts, (self._folder, self._rows)  # without the mapped files

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> RecordTexts:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = bisect.bisect_right(self._ends, index)
        offsets, lines = self._files[part]
        row = int(index) - self._ends[part] + self._rows[part].stop
        place = f"{texts_path(self._folder, self._rows[part].split)}:{row + 1}"
        return parse_line(lines[offsets[row] : offsets[row + 1]].tobytes(), place)

    def without_captions(self) -> Int64[np.ndarray, " n"]:
        """Find the rows without a caption, by a search that parses no line."""
        found = []
        for part, (offsets, lines), end in zip(self._rows, self._files, self._ends, strict=True):
            start, stop = offsets[part.start], offsets[part.stop]
            # In a text the quotation marks would have backslashes.
            matches = re.finditer(rb'"captions": \[\]', lines[start:stop])
            places = np.fromiter((match.start() for match in matches), np.int64) + start
            rows = np.searchsorted(offsets, places, side="right") - 1
            found.append(rows - part.stop + end)
        return np.concatenate(found)

    @functools.cached_property
    def _files(self) -> list[tuple[np.ndarray, np.ndarray]]:
        paths = [texts_path(self._folder, part.split) for part in self._rows]
        return [_mapped(path) for path in paths]


def _mapped(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Map the offsets and the lines of a file of texts."""
    offsets = map_offsets(path.with_suffix(".npy"))
    try:
        return offsets, np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # empty, for example
        raise UserError(f"{path}: cannot be read: {error}") from error


def map_offsets(path: pathlib.Path) -> np.ndarray:
    """Map a file of offsets.

    Raises:
      UserError: it is damaged; names it.
    """
    try:
        offsets = np.load(path, mmap_mode="r")
    except Exception as error:  # a damaged header leads NumPy to any
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read: {reason}") from error
    good = offsets.dtype.kind in "iu" and offsets.ndim == 1
    check(good, f"{path}: must hold whole numbers, the places of lines")
    return offsets


def texts_path(folder: pathlib.Path, split: str) -> pathlib.Path:
    """Return the file of a split's texts; its offsets lie beside it, ending in `.npy`."""
    return folder / f"texts_{split}.jsonl"


def has_texts(folder: pathlib.Path, split: str) -> bool:
    """Return True if both files are there; folders of older versions lack them."""
    path = texts_path(folder, split)
    return path.is_file() and path.with_suffix(".npy").is_file()


def format_line(texts: RecordTexts) -> bytes:
    """Format the texts of a record as a line of ASCII."""
    fields = texts._asdict() | {"questions": [vars(question) for question in texts.questions]}
    return json.dumps(fields).encode() + b"\n"


def parse_line(line: bytes, place: str | pathlib.Path) -> RecordTexts:
    """Parse a line that `format_line` made.

    Raises:
      UserError: it is damaged; the message begins with `place`.
    """
    fields = parse_json(line, place)
    try:
        return RecordTexts(
            fields["match_id"],
            fields["source"],
            tuple(fields["captions"]),
            parse_questions(fields["questions"]),
            tuple(fields["labels"]),
        )
    except (LookupError, TypeError) as error:
        raise UserError(f"{place}: not the texts of a record: {error}") from error


def parse_questions(items: Iterable[dict]) -> tuple[Question, ...]:
    """Build questions from parsed JSON."""
    return tuple(Question(**item | {"options": tuple(item["options"])}) for item in items)


def join_texts(folder: pathlib.Path, split: str, parts: Iterable[pathlib.Path]) -> None:
    """Write the texts of a split from files that hold the lines of its shards, in order."""
    path = texts_path(folder, split)
    with path.open("wb") as file:
        for part in parts:
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, file)
    write_offsets(path)


def write_offsets(path: pathlib.Path) -> None:
    """Write where each line of a file of texts begins."""
    with path.open("rb") as lines:
        sizes = np.fromiter(map(len, lines), np.int64)
    # Offsets last and whole: where they are missing, `has_texts` says that the texts are.
    unfinished = path.with_suffix(".unfinished.npy")
    np.save(unfinished, np.concatenate([[0], np.cumsum(sizes)]))
    unfinished.replace(path.with_suffix(".npy"))


def all_texts(texts: RecordTexts) -> Iterator[str]:
    """Yield everything in a record that a tokenizer will have to read."""
    yield from texts.captions
    for item in texts.questions:
        yield from (item.question, item.answer, *item.options)
