"""Annotations of published data sets: one for each clip, counted, merged and cleaned."""

import dataclasses
from collections.abc import Iterable, Iterator

from data_pipelines.schema.records import Question
from data_pipelines.storage.tasks import Skipped, Task


@dataclasses.dataclass(frozen=True)
class Annotation:
    """Texts of one clip or image in a data set: an `Example` without its media (ours).

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
    """Size of a split before anything is left out; None: not published."""

    clips: int | None = None
    captions: int | None = None
    questions: int | None = None

    def first_difference(self, published: "Counts") -> tuple[str, int] | None:
        """Return a unit of which other counts were published, and that number."""
        for unit, expected in dataclasses.asdict(published).items():
            if expected is not None and getattr(self, unit) != expected:
                return unit, expected
        return None

    def agrees(self, published: "Counts") -> bool:
        """Return True if every published count is this one."""
        return self.first_difference(published) is None


def to_task(annotation: Annotation, path: str, size: int) -> Task:
    """Return the task of reading the media of an annotation."""
    return Task(
        path=path,
        size=size,
        media_type=annotation.media_type,
        captions=annotation.captions,
        # Captions of one media file are right answers to each other, unless a builder knows better.
        match_id=annotation.match_id or annotation.media,
        source=annotation.source,
        questions=annotation.questions,
        labels=annotation.labels or None,
    )


def count(annotations: Iterable[Annotation]) -> Counts:
    """Count clips, captions and questions of a split, as published files count them."""
    clips = captions = questions = 0
    for annotation in annotations:
        clips += 1
        captions += len(annotation.captions)
        questions += len(annotation.questions)
    return Counts(clips, captions, questions)


def merge(annotations: Iterable[Annotation]) -> Iterator[Annotation]:
    """Join the annotations of one media file, in the order of their first appearance (ours).

    Source, match id and labels are those of the first.
    """
    # In memory, as the texts about one clip lie anywhere in a file.
    groups: dict[str, list[Annotation]] = {}
    for annotation in annotations:
        groups.setdefault(annotation.media, []).append(annotation)
    for group in groups.values():
        captions = tuple(text for item in group for text in item.captions)
        questions = tuple(question for item in group for question in item.questions)
        yield dataclasses.replace(group[0], captions=captions, questions=questions)


def paragraph(sentences: Iterable[str]) -> str:
    """Join sentences to one caption, stripped of blanks; empty ones are left out (ours)."""
    return " ".join(filter(None, (sentence.strip() for sentence in sentences)))


def merge_paragraphs(annotations: Iterable[Annotation]) -> Iterator[Annotation]:
    """Merge, with all captions of a media file as one paragraph."""
    for annotation in merge(annotations):
        yield dataclasses.replace(annotation, captions=(paragraph(annotation.captions),))


def clean(annotation: Annotation, *, drop_repeats: bool) -> tuple[Annotation, list[Skipped]]:
    """Drop empty texts (and repeated ones); return the annotation and what was dropped (ours)."""
    captions, bad_captions = _sort_out(annotation.captions, "captions", drop_repeats)
    questions, bad_questions = _sort_out(annotation.questions, "questions", drop_repeats)
    dropped = [
        Skipped(annotation.source, reason, str(item), whole=False)
        for reason, item in (*bad_captions, *bad_questions)
    ]
    return dataclasses.replace(annotation, captions=captions, questions=questions), dropped


def _sort_out(items: tuple, unit: str, drop_repeats: bool) -> tuple[tuple, list[tuple]]:
    """Return the items to keep, and (reason, item) of the others."""
    kept, dropped = [], []
    for item in items:
        if _is_empty(item):
            dropped.append((f"empty {unit}", item))
        # A search in a list: a clip has some dozens of texts.
        elif drop_repeats and item in kept:
            dropped.append((f"repeated {unit}", item))
        else:
            kept.append(item)
    return tuple(kept), dropped


def _is_empty(item: str | Question) -> bool:
    if isinstance(item, str):
        return not item.strip()
    return not item.answer.strip() or not (item.question.strip() or item.options)
