"""The JSON layout of Singularity and VindLU: one list a file, for any data set.

    [{"video": "a/1.mp4", "caption": "a dog runs"},
     {"image": "2.jpg", "caption": ["a cat", "a black cat"]},
     {"video": ["3.webm", "4.webm"], "caption": "Pushing [something]"},
     {"video": "1.mp4", "question": "what runs?", "answer": "a dog"},
     {"video": "1.mp4", "caption": ["a dog", "a cat"], "answer": 0}]

The fourth form is a question (with a list of answers, as in VQA, the most frequent one counts),
the last one a multiple choice. The layout was checked in github.com/jayleicn/singularity
(`configs/`, `dataset/`) and github.com/klauscc/VindLU.
"""

import collections
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.builders import readers
from data_pipelines.builders.annotated import (
    AnnotatedBuilder,
    Annotation,
    Counts,
    merge,
    paragraph,
)
from data_pipelines.records import Question


class JsonLayout(AnnotatedBuilder):
    """A data set in the JSON layout, stored under a name of yours.

    Expects one JSON file for each split, and the media under the paths that it names, relative to
    `manual_dir`. The published files are anno_pretrain.tar.gz and anno_downstream.tar.gz.
    """

    name = "json_layout"
    origin = "github.com/jayleicn/singularity or github.com/klauscc/VindLU"
    media_folder = ""

    def __init__(
        self,
        *,
        name: str,
        splits: Mapping[str, str | pathlib.Path],
        paragraphs: bool = False,
        match_captions: bool = False,
        **kwargs,
    ):
        """Args:
          name: what to call the data set.
          splits: the JSON file of each split.
          paragraphs: the captions of a clip are the sentences of one (DiDeMo, ActivityNet).
          match_captions: clips of equal caption are right answers to each other's (SSv2).

        Raises:
          ValueError: a name that cannot be a folder or a split, or no split.
        """
        for word in (name, *splits):
            if not re.fullmatch("[a-z][a-z0-9_]*", word):
                raise ValueError(f"json_layout: {word!r} must be letters a-z, digits and _")
        if not splits:
            raise ValueError(f"json_layout {name!r}: name at least one split (--split train=PATH)")
        self.name = name
        self.paths = {split: pathlib.Path(path) for split, path in splits.items()}
        self.published = dict.fromkeys(splits, Counts())
        self.paragraphs, self.match_captions = paragraphs, match_captions
        super().__init__(**kwargs)

    def annotations(self, split: str) -> Iterator[Annotation]:
        """All that the file says about a clip or image together."""
        path = self.paths[split]
        if not path.is_file():
            raise FileNotFoundError(f"{self.name}: split {split!r}: {path}: no such file")
        return read_layout(path, paragraphs=self.paragraphs, match_captions=self.match_captions)


def read_layout(
    path: pathlib.Path, *, paragraphs: bool = False, match_captions: bool = False
) -> Iterator[Annotation]:
    """The annotations of a file in the JSON layout, one for each clip or image.

    Raises:
      ValueError: a malformed entry; the message names file, entry and field.
    """
    return merge(_entries(path, paragraphs, match_captions))


def _entries(path: pathlib.Path, paragraphs: bool, match_captions: bool) -> Iterator[Annotation]:
    for place, entry in readers.read_entries(path):
        media_type = "video" if isinstance(entry, dict) and "video" in entry else "image"
        media_names = readers.texts_field(entry, media_type, place)
        captions, questions = _texts(entry, place)
        if paragraphs and captions:
            captions = (paragraph(captions),)
        match_id = captions[0] if match_captions and captions else ""
        for name in media_names:
            yield Annotation(
                name, place, captions, questions, match_id=match_id, media_type=media_type
            )


def _texts(entry: Any, place: str) -> tuple[tuple[str, ...], tuple[Question, ...]]:
    """Captions and questions of an entry in any of its forms."""
    if "question" in entry:
        text = readers.field(entry, "question", str, place)
        answers = readers.texts_field(entry, "answer", place)
        if not answers:
            raise ValueError(f"{place}: field 'answer' is empty")
        [(answer, _)] = collections.Counter(answers).most_common(1)
        return (), (Question(text, answer, str(entry.get("answer_type", ""))),)
    captions = readers.texts_field(entry, "caption", place)
    if "answer" not in entry:
        return captions, ()
    answer = readers.field(entry, "answer", int, place)
    if not 0 <= answer < len(captions):
        raise ValueError(f"{place}: field 'answer' must be one of 0 to {len(captions) - 1}")
    right = captions[answer]
    return (right,), (Question("", right, "multiple choice", captions),)
