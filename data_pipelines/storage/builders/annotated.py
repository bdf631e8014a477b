"""The base of the builders for published data sets: annotation files and a folder of media.

The user fills a folder (`manual_dir`) with the annotation files as they are published and a
folder of videos or images. All annotations are read and counted before the first media file is:
a wrong file, a malformed entry or another count than the published one stops at once.
"""

import abc
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from data_pipelines.media.endings import type_of
from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.storage.builders import base
from data_pipelines.storage.builders.annotation import Annotation, Counts, clean, count, to_task
from data_pipelines.storage.builders.media import MediaFolder
from data_pipelines.storage.tasks import Skipped, Task, map_threads


class AnnotatedBuilder(base.VideoTextBuilder):
    """A data set in a folder of the user's, in the published form (ours).

    Subclasses say in their docstring which files are expected, fill the class attributes and
    implement `annotations`. Left out, counted and listed in `skipped.jsonl`: examples without a
    media file; empty texts; annotations that repeat another one of the split word for word; and
    of the training clips also repeated captions and questions. In the other splits these stay,
    because the published figures count each of them as a query.
    """

    published: ClassVar[Mapping[str, Counts]]  # every split, with the published counts
    # Further editions of the files, by name, each with the counts of some splits.
    editions: ClassVar[Mapping[str, Mapping[str, Counts]]] = {}
    origin: ClassVar[str]  # where the annotation files come from
    media_folder: ClassVar[str] = "videos"
    media_type: ClassVar[str] = "video"  # or "image", or "" to go by the ending of each file
    exact_paths: ClassVar[bool] = False  # names are paths: the folder is never searched
    drop_repeats = True

    def __init__(
        self,
        *,
        manual_dir: str | pathlib.Path | None = None,
        allow_other_counts: bool = False,
        **kwargs,
    ):
        """Take the folder of the published files.

        Args:
          manual_dir: the folder; prepared data do not need it.
          allow_other_counts: report counts that are not the published ones, and go on.
          **kwargs: those of all builders.
        """
        super().__init__(**kwargs)
        self.manual_dir = manual_dir and pathlib.Path(manual_dir).expanduser()
        self.allow_other_counts = allow_other_counts
        self._inputs: dict[pathlib.Path, None] = {}  # an ordered set

    @abc.abstractmethod
    def annotations(self, split: str) -> Iterable[Annotation]:
        """Return the annotations of a split in a fixed order, one for each clip; read twice."""

    def media_names(self, annotation: Annotation) -> tuple[str, ...]:
        """Return names that the media file may have, the likeliest first."""
        return (annotation.media,)

    def file(self, name: str) -> pathlib.Path:
        """Return an annotation file.

        Raises:
          MissingError: it is missing; the message says where to get it.
          UserError: no `manual_dir` was given.
        """
        path = self._root() / name
        if not path.is_file():
            raise MissingError(f"{self.name}: {path}: no such file; it is from {self.origin}")
        self._inputs[path] = None
        return path

    def optional_file(self, name: str) -> pathlib.Path | None:
        """Return an annotation file if it is there."""
        return self.file(name) if (self._root() / name).is_file() else None

    def _root(self) -> pathlib.Path:
        if self.manual_dir is None:
            raise UserError(f"{self.name}: --manual-dir DIR must name the folder with its files")
        return self.manual_dir

    def examples(self) -> dict[str, Iterator[Task | Skipped]]:
        """Yield one task for each annotation, in the order of the files.

        Raises:
          MissingError: an annotation file or the media folder is missing.
          UserError: a malformed entry, or a count that is not the published one.
        """
        # In this order: what costs a look comes before what costs a pass over all entries.
        self._check_files()
        for split in self.published:
            self._check_counts(split)
        media = self._media()
        return {split: self._examples(split, media) for split in self.published}

    def _check_files(self) -> None:
        """Name all splits without annotation files at once, and the media folder."""
        missing = []
        for split in self.published:
            try:
                # The first entry is enough to open every file that the split needs.
                next(iter(self.annotations(split)), None)
            except MissingError as error:
                missing.append(str(error))
        if self.manual_dir and not (self.manual_dir / self.media_folder).is_dir():
            missing.append(f"{self.manual_dir / self.media_folder}: no such folder")
        if missing:
            raise MissingError("; ".join(missing))

    def inputs(self) -> tuple[pathlib.Path, ...]:
        """Return the annotation files that `file` has given out."""
        return tuple(self._inputs)

    def _media(self) -> MediaFolder:
        return MediaFolder(self._root() / self.media_folder, search=not self.exact_paths)

    def _check_counts(self, split: str) -> None:
        if self.published[split] == Counts():
            return
        found = count(self.annotations(split))
        # Another edition of the files asks other queries, and its figures cannot be compared.
        if found.agrees(self.published[split]):
            return
        edition = self.edition(split, found)
        if edition:
            print(f"{self.name}: split {split!r} is that {edition}", file=sys.stderr)
            return
        unit, expected = found.first_difference(self.published[split])
        message = (
            f"{self.name}: split {split!r} has {getattr(found, unit):,} {unit} in its annotation "
            f"files, published are {expected:,}"
        )
        if not self.allow_other_counts:
            raise UserError(f"{message}; if that is meant, add --allow-other-counts")
        print(f"{message}; allowed", file=sys.stderr)

    def edition(self, split: str, found: Counts) -> str | None:
        """Return the name of the known edition with these counts, if there is one."""
        known = ((name, counts.get(split)) for name, counts in self.editions.items())
        return next((name for name, counts in known if counts and found.agrees(counts)), None)

    def _examples(self, split: str, media: MediaFolder) -> Iterator[Task | Skipped]:
        cleaned = self._cleaned(split)
        # In threads: on a network file system each look-up waits.
        return map_threads(lambda item: self._find(item, media), cleaned)

    def _cleaned(self, split: str) -> Iterator[Annotation | Skipped]:
        for annotation in self.annotations(split):
            annotation, dropped = clean(annotation, drop_repeats=split == "train")
            yield from dropped
            yield annotation

    def _find(self, item: Annotation | Skipped, media: MediaFolder) -> Task | Skipped:
        if isinstance(item, Skipped):
            return item
        if not (item.captions or item.questions or item.labels):
            return Skipped(item.source, "without a text")
        # Looked for now, by name: a preparation of days must not end for a folder that is missing.
        names = self.media_names(item)
        found = next(filter(None, map(media.find, names)), None)
        if found is None:
            detail = f"{media.root}: {' or '.join(names)}"
            return Skipped(item.source, "without a media file", detail)
        media_type = item.media_type or self.media_type or type_of(found[0])
        return to_task(dataclasses.replace(item, media_type=media_type), *found)
