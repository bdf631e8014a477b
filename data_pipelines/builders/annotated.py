"""The base of the builders for published data sets: annotation files and a folder of media.

The user fills a folder (`manual_dir`) with the annotation files as they are published and a
folder of videos or images. All annotations are read and counted before the first media file is:
a wrong file, a malformed entry or another count than the published one stops at once.
"""

import abc
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from data_pipelines.builders import base
from data_pipelines.builders.media import MediaFolder
from data_pipelines.records import Example, Question


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What a data set says about one clip or image: an `Example` without its media (ours).

    `media` is its id, or its path in the media folder. `match_id` is by default `media`.
    """

    media: str
    source: str
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    labels: tuple[str, ...] = ()
    match_id: str = ""
    media_type: str = ""  # by default that of the builder


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much a split holds, before anything is left out; None: not published."""

    clips: int | None = None
    captions: int | None = None
    questions: int | None = None


class AnnotatedBuilder(base.VideoTextBuilder):
    """A data set in a folder of the user's, in the published form (ours).

    Subclasses say in their docstring which files are expected, fill the class attributes and
    implement `annotations`. Left out, counted and listed in `skipped.jsonl`: examples without a
    media file; empty texts; annotations that repeat another one of the split word for word; and
    of the training clips also repeated captions and questions. In the other splits these stay,
    because the published figures count each of them as a query.
    """

    published: ClassVar[Mapping[str, Counts]]  # every split, with the published counts
    origin: ClassVar[str]  # where the annotation files come from
    media_folder: ClassVar[str] = "videos"
    media_type: ClassVar[str] = "video"  # or "image"
    exact_paths: ClassVar[bool] = False  # names are paths: the folder is never searched

    def __init__(
        self,
        *,
        manual_dir: str | pathlib.Path | None = None,
        allow_other_counts: bool = False,
        beam_options: Sequence[str] | None = None,
        **kwargs,
    ):
        """Args:
        manual_dir: the folder with the files; prepared data do not need it.
        allow_other_counts: report counts that are not the published ones, and go on.
        beam_options: read the media in an Apache Beam pipeline with these options; its workers
          must see `manual_dir` and `data_dir`.
        **kwargs: those of all builders.
        """
        super().__init__(**kwargs)
        self.beam_options = beam_options
        self.manual_dir = manual_dir and pathlib.Path(manual_dir).expanduser()
        self.allow_other_counts = allow_other_counts

    @abc.abstractmethod
    def annotations(self, split: str) -> Iterable[Annotation]:
        """The annotations of a split in a fixed order, one for each clip; read twice."""

    def media_names(self, annotation: Annotation) -> tuple[str, ...]:
        """Names that the media file may have, the likeliest first."""
        return (annotation.media,)

    def file(self, name: str) -> pathlib.Path:
        """An annotation file.

        Raises:
          FileNotFoundError: it is missing; the message says where to get it.
          ValueError: no `manual_dir` was given.
        """
        path = self._root() / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.name}: {path}: no such file; it is from {self.origin}")
        return path

    def _root(self) -> pathlib.Path:
        if self.manual_dir is None:
            raise ValueError(f"{self.name}: --manual-dir DIR must name the folder with its files")
        return self.manual_dir

    def examples(self) -> dict[str, Iterator[Example | base.Skipped]]:
        """One example for each annotation, in the order of the files.

        Raises:
          FileNotFoundError: an annotation file or the media folder is missing.
          ValueError: a malformed entry, or a count that is not the published one.
        """
        for split in self.published:
            self._check_counts(split)
        media = self._media()
        return {split: self._examples(split, media) for split in self.published}

    def _media(self) -> MediaFolder:
        return MediaFolder(self._root() / self.media_folder, search=not self.exact_paths)

    def _check_counts(self, split: str) -> None:
        found = dataclasses.asdict(count(self.annotations(split)))
        for unit, expected in dataclasses.asdict(self.published[split]).items():
            if expected is None or found[unit] == expected:
                continue
            message = (
                f"{self.name}: split {split!r} has {found[unit]:,} {unit} in its annotation "
                f"files, published are {expected:,}"
            )
            if not self.allow_other_counts:
                raise ValueError(f"{message}; if that is meant, add --allow-other-counts")
            print(f"{message}; allowed", file=sys.stderr)

    def _examples(self, split: str, media: MediaFolder) -> Iterator[Example | base.Skipped]:
        for item in self._found(split, media):
            yield item if isinstance(item, base.Skipped) else load(*item)

    def _found(
        self, split: str, media: MediaFolder
    ) -> Iterator[tuple[Annotation, pathlib.Path] | base.Skipped]:
        """What is to be stored, with its media file, and what is left out."""
        seen: set[int] = set()
        for annotation in self.annotations(split):
            # Without the source, the only field that differs between copies.
            key = hash(dataclasses.replace(annotation, source=""))
            if key in seen:
                yield base.Skipped(annotation.source, "repeated annotations", whole=False)
                continue
            seen.add(key)
            annotation, dropped = clean(annotation, drop_repeats=split == "train")
            yield from dropped
            yield self._find(annotation, media)

    def _find(
        self, annotation: Annotation, media: MediaFolder
    ) -> tuple[Annotation, pathlib.Path] | base.Skipped:
        if not (annotation.captions or annotation.questions or annotation.labels):
            return base.Skipped(annotation.source, "without a caption")
        names = self.media_names(annotation)
        path = next(filter(None, map(media.find, names)), None)
        if path is None:
            detail = f"{media.root}: {' or '.join(names)}"
            return base.Skipped(annotation.source, "without a media file", detail)
        media_type = annotation.media_type or self.media_type
        return dataclasses.replace(annotation, media_type=media_type), path

    def _split_generators(self, dl_manager) -> dict:
        if self.beam_options is None:
            return super()._split_generators(dl_manager)
        from data_pipelines.builders import beam_steps

        for split in self.published:
            self._check_counts(split)
        media = self._media()
        self._choose_vocabulary_splits(self.published)
        for split in self.published:
            found = (self._note(item, split) for item in self._found(split, media))
            if not beam_steps.write_tasks(self._tasks(split), filter(None, found)):
                self._refuse_empty(split)
        return {
            split: beam_steps.ReadMedia(self._tasks(split), self.reencode)
            for split in self.published
        }

    def _note(self, item: tuple | base.Skipped, split: str) -> tuple | None:
        """The item itself, or None if it is skipped, which is noted."""
        if isinstance(item, base.Skipped):
            self._note_skipped(item, split)
            return None
        return item

    def _tasks(self, split: str) -> pathlib.Path:
        return pathlib.Path(self.data_path) / f"tasks_{split}.jsonl"

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        if self.beam_options is not None:
            from apache_beam.options.pipeline_options import PipelineOptions

            options = PipelineOptions(list(self.beam_options))
            download_config = dataclasses.replace(download_config, beam_options=options)
        super()._download_and_prepare(dl_manager, download_config)

    def _after_generation(self) -> None:
        """Notes what Beam's workers stored and skipped."""
        if self.beam_options is None:
            return
        from data_pipelines.builders import beam_steps

        for split in self.published:
            stored = 0
            for item in beam_steps.read_results(self._tasks(split)):
                if self._note(item, split) is not None:
                    self._note_texts(item, split)
                    stored += 1
            self._audit.num_stored[split] = stored


def load(annotation: Annotation, path: pathlib.Path) -> Example | base.Skipped:
    """The example of an annotation and its media file, or why it cannot be read."""
    try:
        media = path.read_bytes()
    except OSError as error:
        detail = f"{path}: {error.strerror}"
        return base.Skipped(annotation.source, "without a readable media file", detail)
    return Example(
        media=media,
        media_type=annotation.media_type,
        captions=annotation.captions,
        match_id=annotation.match_id or annotation.media,
        source=annotation.source,
        questions=annotation.questions,
        labels=annotation.labels,
    )


def count(annotations: Iterable[Annotation]) -> Counts:
    """Clips, captions and questions of a split, as published files count them."""
    clips = captions = questions = 0
    for annotation in annotations:
        clips += 1
        captions += len(annotation.captions)
        questions += len(annotation.questions)
    return Counts(clips, captions, questions)


def merge(annotations: Iterable[Annotation]) -> Iterator[Annotation]:
    """Joins the annotations of one media file, in the order of their first appearance (ours).

    Source, match id and labels are those of the first.
    """
    groups: dict[str, list[Annotation]] = {}
    for annotation in annotations:
        groups.setdefault(annotation.media, []).append(annotation)
    for group in groups.values():
        captions = tuple(text for item in group for text in item.captions)
        questions = tuple(question for item in group for question in item.questions)
        yield dataclasses.replace(group[0], captions=captions, questions=questions)


def paragraph(sentences: Iterable[str]) -> str:
    """Sentences as one caption, each without the blanks around it, empty ones left out (ours)."""
    return " ".join(filter(None, (sentence.strip() for sentence in sentences)))


def merge_paragraphs(annotations: Iterable[Annotation]) -> Iterator[Annotation]:
    """As `merge`, with all captions of a media file as one paragraph."""
    for annotation in merge(annotations):
        yield dataclasses.replace(annotation, captions=(paragraph(annotation.captions),))


def clean(annotation: Annotation, *, drop_repeats: bool) -> tuple[Annotation, list[base.Skipped]]:
    """The annotation without empty texts (and repeated ones), and what was left out (ours)."""
    captions, bad_captions = _sort_out(annotation.captions, "captions", drop_repeats)
    questions, bad_questions = _sort_out(annotation.questions, "questions", drop_repeats)
    dropped = [
        base.Skipped(annotation.source, reason, str(item), whole=False)
        for reason, item in (*bad_captions, *bad_questions)
    ]
    return dataclasses.replace(annotation, captions=captions, questions=questions), dropped


def _sort_out(items: tuple, unit: str, drop_repeats: bool) -> tuple[tuple, list[tuple]]:
    """The items to keep, and (reason, item) of the others."""
    kept, dropped = [], []
    for item in items:
        if _is_empty(item):
            dropped.append((f"empty {unit}", item))
        elif drop_repeats and item in kept:
            dropped.append((f"repeated {unit}", item))
        else:
            kept.append(item)
    return tuple(kept), dropped


def _is_empty(item: str | Question) -> bool:
    if isinstance(item, str):
        return not item.strip()
    return not item.answer.strip() or not (item.question.strip() or item.options)
