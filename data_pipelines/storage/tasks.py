"""Tasks of a preparation: examples whose media are not read yet, kept on disk in shuffled order.

A plan lists every task before the first media file is decoded. Task i of a split goes to the place
of MD5(split + i) among all of them, the order that TFDS would store, and a shard is a fixed range
of these places. So a shard holds the same bytes whoever writes it, and when.
"""

import array
import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.json_files import parse_json
from data_pipelines.schema.records import Example, Question
from data_pipelines.storage.texts import map_offsets, parse_questions
from data_pipelines.text.unicode import well_formed

_THREADS = 16  # that wait for a file system
_BLOCK = 256  # items that one thread takes at once
_SHOWN_SOURCES = 3


@dataclasses.dataclass(frozen=True)
class Task:
    """An `Example` without its media, and the place where these lie.

    `path` names a file, of which the media are the `size` bytes from `start` on. A builder with a
    `load` of its own may put anything there.
    """

    path: str
    size: int
    media_type: str = "video"
    captions: tuple[str, ...] = ()
    match_id: str = ""
    source: str = ""
    questions: tuple[Question, ...] = ()
    labels: tuple[str, ...] | None = None
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An example that cannot be used, or a part of one: its source and the reason.

    A builder yields one in place of an example that it cannot make (say, a missing file), or with
    `whole` False beside an example, for a text of it that is left out (say, an empty caption).
    `reason` is one of few short phrases, which are counted; `detail` is free text.
    """

    source: str
    reason: str
    detail: str = ""
    split: str = ""
    whole: bool = True  # only whole examples count against max_bad_ratio


class Tally:
    """Counts of skipped examples and of parts, by reason."""

    def __init__(self, skipped: Iterable[Skipped] = ()):
        """Count the given ones."""
        self.examples: collections.Counter[str] = collections.Counter()
        self.parts: collections.Counter[str] = collections.Counter()
        self.first: list[Skipped] = []
        for item in skipped:
            self.add(item)

    def add(self, item: Skipped) -> None:
        """Count one more."""
        (self.examples if item.whole else self.parts)[item.reason] += 1
        if item.whole and len(self.first) < _SHOWN_SOURCES:
            self.first.append(item)

    @property
    def num_bad(self) -> int:
        """Number of whole examples that were skipped."""
        return self.examples.total()

    def why(self) -> str:
        """Return the reasons with their counts and the first sources, for a one-line message."""
        if not self.first:
            return ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.examples.most_common())
        first, *others = self.first
        detail = f" ({first.detail})" if first.detail else ""
        sources = ", ".join([first.source + detail, *(item.source for item in others)])
        return f" ({reasons}; first: {sources})"


class TaskList:
    """The tasks of one split on disk, by their place in the shuffled order."""

    def __init__(self, folder: pathlib.Path, split: str):
        """Open the files that `write_tasks` made; the offsets stay on disk."""
        self._path = folder / f"tasks_{split}.jsonl"
        self._offsets = map_offsets(folder / f"tasks_{split}.npy")

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, start: int, stop: int) -> Iterator[Task]:
        """Yield the tasks at the places from `start` up to `stop`."""
        with self._path.open("rb") as file:
            for offset in self._offsets[start:stop]:
                file.seek(max(0, offset))  # a damaged one leads to a line that is no task
                yield _parse_task(file.readline(), self._path)


def write_tasks(
    folder: pathlib.Path,
    split: str,
    items: Iterable[Example | Task | Skipped],
    note: Callable[[Skipped], None],
    *,
    drop_repeats: bool = False,
    shuffled: bool = True,
) -> tuple[int, int]:
    """Write the tasks of a split as they come; in memory there are 24 bytes for each.

    Media of whole examples go to a file beside the tasks, so that any process can read them.

    Args:
      folder: gets `tasks_SPLIT.jsonl`, `tasks_SPLIT.npy` and, for whole examples, `media_SPLIT`.
      split: the name of the split.
      items: examples, tasks and what is skipped, in a fixed order.
      note: called with each skipped item.
      drop_repeats: skip tasks that differ from an earlier one in nothing but their source.
      shuffled: put them in random order.

    Returns:
      The number of tasks, and the bytes of their media.
    """
    # Arrays of numbers, not lists: ten million tasks take 240 MB, and the tasks themselves stay on
    # disk.
    offsets, keys, num_bytes = array.array("q"), array.array("Q"), 0
    path, spool_path = folder / f"tasks_{split}.jsonl", folder / f"media_{split}"
    with path.open("wb") as file, spool_path.open("wb") as spool:
        for item in items:
            if isinstance(item, Skipped):
                note(dataclasses.replace(item, split=split))
                continue
            task = _spool(item, spool) if isinstance(item, Example) else item
            offsets.append(file.tell())
            file.write(_format_task(task))
            num_bytes += task.size
            if drop_repeats:
                keys.append(_key(task))
    kept = np.frombuffer(offsets, np.int64)
    if drop_repeats and len(keys):
        # By a digest of eight bytes: the chance that two of ten million tasks collide is 3 in a
        # million.
        kept, repeats = _first_of_each(np.frombuffer(keys, np.uint64), kept)
        for task in _read_at(path, repeats):
            note(Skipped(task.source, "repeated annotations", split=split, whole=False))
    order = shuffled_order(split, len(kept)) if shuffled else slice(None)
    np.save(folder / f"tasks_{split}.npy", kept[order])
    return len(kept), num_bytes


def shuffled_order(split: str, count: int) -> np.ndarray:
    """Return the numbers below `count` in the order of TFDS: by MD5 of split and number."""
    # MD5 because TFDS takes it: data sets that older versions prepared keep their order.
    salted = hashlib.md5(split.encode(), usedforsecurity=False)

    def digest(number: int) -> int:
        hasher = salted.copy()
        hasher.update(b"%09d" % number)
        return int.from_bytes(hasher.digest()[:8], "big")  # ties are as good as impossible

    digests = np.fromiter((digest(number) for number in range(count)), np.uint64, count)
    return np.argsort(digests, kind="stable")


def map_threads(function: Callable[[Any], Any], items: Iterable) -> Iterator:
    """Apply a function that waits for files to each item, in threads and in order.

    Few items are held at a time, so there may be any number.
    """
    items = iter(items)
    blocks = iter(lambda: list(itertools.islice(items, _BLOCK)), [])

    def apply(block: list) -> list:
        return [function(item) for item in block]

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        # A bounded queue of blocks: results come in order, and memory stays small however slow the
        # file system.
        running = collections.deque()
        for block in blocks:
            running.append(pool.submit(apply, block))
            if len(running) == 2 * _THREADS:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def _spool(example: Example, spool) -> Task:
    fields = {name: value for name, value in vars(example).items() if name != "media"}
    texts = _as_tuples(fields) | {"questions": tuple(example.questions)}
    start = spool.tell()
    spool.write(example.media)
    return Task(path=spool.name, size=len(example.media), start=start, **fields | texts)


def _as_tuples(fields: Mapping[str, Any]) -> dict[str, tuple[str, ...] | None]:
    """Return captions and labels as a task holds them; labels that are not known stay None."""
    labels = fields["labels"]
    known = None if labels is None else tuple(labels)
    return {"captions": tuple(fields["captions"]), "labels": known}


def _format_task(task: Task) -> bytes:
    fields = vars(task) | {"questions": [vars(question) for question in task.questions]}
    texts = {name: _well_formed(value) for name, value in fields.items() if name != "path"}
    return json.dumps(fields | texts).encode() + b"\n"


def _well_formed(value: Any) -> Any:
    """Return a field, all of whose texts can be stored as UTF-8."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, Mapping):
        return {name: _well_formed(item) for name, item in value.items()}
    return [*map(_well_formed, value)] if isinstance(value, Sequence) else value


def _parse_task(line: bytes, path: pathlib.Path) -> Task:
    fields = parse_json(line, path, keep_halves=True)  # the path must find its file
    try:
        questions = parse_questions(fields["questions"])
        return Task(**fields | _as_tuples(fields) | {"questions": questions})
    except (LookupError, TypeError) as error:
        raise UserError(f"{path}: not a task: {error}") from error


def _key(task: Task) -> int:
    line = _format_task(dataclasses.replace(task, source=""))
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "big")


def _first_of_each(keys: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split offsets into those of the first task of each key, and the others."""
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return offsets[first], offsets[~first]


def _read_at(path: pathlib.Path, offsets: np.ndarray) -> Iterator[Task]:
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            yield _parse_task(file.readline(), path)
