"""Your own data: a builder that reads folders of media, one for each split, without a list.

Texts lie beside the media: each line of a `.txt` is a caption, and a `.json` holds the fields of a
manifest, all but `media` (see `manifest`):

    clips/1.mp4  clips/1.txt  clips/more/2.mp4  clips/more/2.json

Or no file has texts beside it, and the folders of the first level are classes, whose names become
labels:

    clips/dog/1.mp4  clips/cat/2.mp4
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from data_pipelines.media.endings import is_media, stem, type_of
from data_pipelines.media.folders import walk
from data_pipelines.schema.checks import MissingError, check
from data_pipelines.schema.json_files import read_json, read_text
from data_pipelines.storage.builders import base
from data_pipelines.storage.builders.manifest import read_entry
from data_pipelines.storage.builders.media import file_size
from data_pipelines.storage.builders.named import check_names
from data_pipelines.storage.tasks import Skipped, Task, map_threads

TEXT_ENDINGS = (".txt", ".json")
EXPECTED = (
    "expected are files such as:\n"
    "  clips/1.mp4 and clips/1.txt (a caption in each line) or clips/1.json\n"
    "  clips/dog/1.mp4 and clips/cat/2.mp4 (a folder for each class)"
)


class Found(NamedTuple):
    """A clip or image, and the file of texts beside it, if there is one."""

    path: str
    texts: str | None


class Folder(base.VideoTextBuilder):
    """A data set from folders of media; it is stored under the given name."""

    def __init__(self, *, name: str, splits: Mapping[str, str | pathlib.Path], **kwargs):
        """Take the name of the data set and, by split, the folders, which are listed here.

        Raises:
          UserError: a name that cannot be a folder or a split, no split, or a folder without media.
          MissingError: a folder does not exist.
        """
        check_names("folder", name, splits)
        self.name = name
        self.folders = {split: pathlib.Path(path).expanduser() for split, path in splits.items()}
        for split, root in self.folders.items():
            if not root.is_dir():
                raise MissingError(f"folder of split {split!r}: {root}: no such folder")
        self._found = {split: list(find_media(root)) for split, root in self.folders.items()}
        for split, root in self.folders.items():
            check(bool(self._found[split]), f"{root}: holds no clip or image; {EXPECTED}")
        # Of the request, so that the same command notices a new clip or an edited caption.
        self.contents = {
            split: _contents(root, self._found[split]) for split, root in self.folders.items()
        }
        super().__init__(**kwargs)

    def examples(self) -> dict[str, Iterator[Task | Skipped]]:
        """Yield one task for each clip or image, in the order of their paths.

        Raises:
          UserError: neither texts nor folders of classes.
        """
        return {split: self._tasks(split) for split in self.folders}

    def _tasks(self, split: str) -> Iterator[Task | Skipped]:
        root, found = self.folders[split], self._found[split]
        if any(item.texts for item in found):
            return map_threads(_with_texts, found)
        check(
            any(class_of(root, item.path) for item in found),
            f"{root}: its {len(found)} clips and images have no texts beside them, and lie in no "
            f"folders of classes; {EXPECTED}",
        )
        return map_threads(lambda item: _labeled(item.path, class_of(root, item.path)), found)


def find_media(root: str | os.PathLike) -> Iterator[Found]:
    """Yield the media below a folder, each with the file of texts beside it."""
    for folder in walk(root):
        names = {*folder.files}
        for path in filter(is_media, folder.files):
            head = os.path.join(folder.path, stem(os.path.basename(path)))
            yield Found(path, next((head + x for x in TEXT_ENDINGS if head + x in names), None))


def class_of(root: str | os.PathLike, path: str) -> str:
    """Return the first folder below `root` on the way to a file; empty: none."""
    first, *rest = pathlib.PurePath(path).relative_to(root).parts
    return first if rest else ""


def _contents(root: pathlib.Path, found: Sequence[Found]) -> str:
    """Describe a folder: names and sizes of its media, and what the files of texts say."""
    digest = hashlib.blake2b(digest_size=8)
    for path, texts in found:
        said = pathlib.Path(texts).read_bytes() if texts else b""
        name = os.path.relpath(path, root)
        digest.update(os.fsencode(f"{name}:{file_size(path)}:{len(said)}:") + said)
    return f"{len(found)} clips and images, digest {digest.hexdigest()}"


def _with_texts(found: Found) -> Task | Skipped:
    if found.texts is None:
        return Skipped(found.path, "without a text beside it")
    path = pathlib.Path(found.texts)
    if path.suffix == ".txt":
        lines = [line.strip() for line in read_text(path).splitlines()]
        entry = {"captions": [line for line in lines if line]}
    else:
        entry = read_json(path)
    # By the path, since names such as 1.mp4 may stand in several folders.
    entry = {"id": found.path, **entry, "media": os.path.basename(found.path)}
    task = read_entry(entry, os.path.dirname(found.path), found.texts)
    return task if isinstance(task, Skipped) else _sized(task)


def _labeled(path: str, name: str) -> Task | Skipped:
    if not name:
        return Skipped(path, "in no folder of a class")
    return _sized(Task(path, 0, type_of(path), match_id=path, source=path, labels=(name,)))


def _sized(task: Task) -> Task | Skipped:
    size = file_size(task.path)
    if size is None:
        return Skipped(task.source, "without a readable media file", task.path)
    return dataclasses.replace(task, size=size)
