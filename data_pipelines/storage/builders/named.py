"""Data sets that the user names, with a file or several for each split."""

import abc
import collections
import concurrent.futures
import glob
import multiprocessing
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data_pipelines.schema.checks import MissingError, check
from data_pipelines.storage.builders import base
from data_pipelines.storage.builders.entries import Fields, fields_of
from data_pipelines.storage.shards import end_with_parent
from data_pipelines.storage.tasks import Skipped, Task


class FilesBuilder(base.VideoTextBuilder):
    """A data set from files that hold media and texts, stored under a name of yours (ours)."""

    kind: str  # key of the builders' registry
    shuffled = False

    def __init__(
        self,
        *,
        name: str,
        splits: Mapping[str, str | pathlib.Path],
        fields: Mapping[str, str] | None = None,
        **kwargs,
    ):
        """Take the files of each split.

        Args:
          name: what to call the data set.
          splits: a pattern for the files of each split, "cc12m/{00000..01242}.tar".
          fields: role -> name of the field, see `entries.FIELDS`.
          **kwargs: those of all builders.

        Raises:
          UserError: a name that cannot be a folder or a split, no split, or an unknown role.
        """
        check_names(self.kind, name, splits)
        self.name, self.splits, self.fields = name, dict(splits), dict(fields or {})
        fields_of(self.fields)
        super().__init__(**kwargs)

    @abc.abstractmethod
    def read_file(self, path: pathlib.Path, fields: Fields) -> Iterator[Task | Skipped]:
        """Yield the tasks of a file, in its order."""

    def examples(self) -> dict[str, Iterator[Task | Skipped]]:
        """Yield a task for each example, in the order of the files.

        Raises:
          MissingError: a file is missing.
        """
        files = {split: self._files(split) for split in self.splits}
        fields = fields_of(self.fields)
        return {split: self._tasks(paths, fields) for split, paths in files.items()}

    def _tasks(self, paths: Sequence[pathlib.Path], fields: Fields) -> Iterator[Task | Skipped]:
        """Yield the tasks of files in order; some files ahead are read by worker processes."""
        workers = min(self.workers, len(paths))
        if workers <= 1:
            for path in paths:
                yield from self.read_file(path, fields)
            return
        # Spawned, since a fork would copy the locks of threads.
        context = multiprocessing.get_context("spawn")
        running: collections.deque[concurrent.futures.Future] = collections.deque()
        with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent) as pool:
            for path in paths:
                running.append(pool.submit(_list_tasks, self, path, fields))
                # A few files ahead and no more: the tasks of each are held in memory.
                if len(running) > 2 * workers:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()

    def inputs(self) -> tuple[pathlib.Path, ...]:
        """Return the files."""
        return tuple(path for split in self.splits for path in self._files(split))

    def _files(self, split: str) -> list[pathlib.Path]:
        return split_files(self.name, split, self.splits[split])


def _list_tasks(builder: FilesBuilder, path: pathlib.Path, fields: Fields) -> list[Task | Skipped]:
    return list(builder.read_file(path, fields))


def check_names(builder: str, name: str, splits: Iterable[str]) -> None:
    """Check the name of a data set and of its splits, which become names of files.

    Raises:
      UserError: a name that cannot be a folder or a split, or no split.
    """
    check(bool(splits), f"{builder} {name!r}: name at least one split (--split train=PATH)")
    for word in (name, *splits):
        # Names of folders and of TFDS's splits; both must survive a notation like train[:90%].
        good = re.fullmatch("[a-z][a-z0-9_]*", word)
        check(bool(good), f"{builder}: {word!r} must be letters a-z, digits and _")


def split_files(name: str, split: str, pattern: str | pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a split, in order.

    Args:
      name: of the data set, for messages.
      split: its name, for messages.
      pattern: a path, with `*` for any characters or `{000..012}` for numbers.

    Raises:
      MissingError: a file is missing; names the first one.
    """
    paths = [pathlib.Path(path).expanduser() for path in expand(str(pattern))]
    missing = [path for path in paths if not path.is_file()] or ([] if paths else [pattern])
    if missing:
        more = f" (and {len(missing) - 1:,} others)" if len(missing) > 1 else ""
        raise MissingError(f"{name}: split {split!r}: {missing[0]}: no such file{more}")
    return paths


def expand(pattern: str) -> list[str]:
    """List the paths of a pattern.

    >>> expand("a/{008..010}.tar")
    ['a/008.tar', 'a/009.tar', 'a/010.tar']
    """
    # The notation of webdataset; a missing number is an error, where * would not notice it.
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not numbers:
        return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    first, last = numbers.groups()
    head, tail = pattern[: numbers.start()], pattern[numbers.end() :]
    return [
        path
        for number in range(int(first), int(last) + 1)
        for path in expand(f"{head}{number:0{len(first)}d}{tail}")
    ]
