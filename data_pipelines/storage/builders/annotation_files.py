"""Annotation files of any data set, in any form of `forms`, with any field names of `entries`.

    {"video": "a/1.mp4", "caption": "a dog runs"}
    {"image": "2.jpg", "caption": ["a cat", "a black cat"]}
    {"video_id": "video7", "question": "what runs?", "answer": "a dog", "answer_type": "what"}
    {"clip_name": "8", "question": "where?", "options": ["here", "there"], "answer": 1}
    {"clip_name": "8", "options": ["a dog", "a cat"], "answer": "0"}

`videos/video7.mp4` is found by `video7`, by `7` (of HQGA's tables) and by `data/mp4/video7`; a path
that leads to a file counts first. The forms were checked in excerpts of the published files and in
the code of github.com/jayleicn/singularity, github.com/klauscc/VindLU and github.com/ArrowLuo/
CLIP4Clip.
"""

import itertools
import pathlib
from collections.abc import Iterator, Mapping

from data_pipelines.media.endings import stem
from data_pipelines.schema.checks import MissingError, UserError, check
from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts, merge
from data_pipelines.storage.builders.entries import FIELDS, Fields, annotations_of, fields_of
from data_pipelines.storage.builders.forms import form_of, read_ids, read_rows
from data_pipelines.storage.builders.named import check_names, split_files


class Annotations(AnnotatedBuilder):
    """A data set from annotation files in any public form, stored under a name of yours.

    Expects one annotation file for each split, or one with several splits, and a folder of media.
    """

    name = "annotations"
    origin = "the repository that published it"
    media_folder = ""
    media_type = ""

    def __init__(
        self,
        *,
        name: str,
        splits: Mapping[str, str | pathlib.Path],
        lists: Mapping[str, str | pathlib.Path] | None = None,
        fields: Mapping[str, str] | None = None,
        paragraphs: bool = False,
        match_captions: bool = False,
        **kwargs,
    ):
        """Take the files of each split; `manual_dir` is the folder of the media.

        Args:
          name: what to call the data set.
          splits: the annotation file of each split.
          lists: for some splits a list of the clips that belong to it, in place of what the
            annotation file says about splits.
          fields: role (a key of `FIELDS`) -> the name of the field in these files.
          paragraphs: see `annotations_of`.
          match_captions: see `annotations_of`.
          **kwargs: those of all builders.

        Raises:
          UserError: a name that cannot be a folder or a split, no split, or an unknown role.
        """
        check_names("annotations", name, splits)
        self.name = name
        self.splits, self.lists = dict(splits), dict(lists or {})
        self.fields = dict(fields or {})
        # Called for its check: a wrong role shows before any file is read.
        fields_of(self.fields)
        for split in self.lists:
            check(split in splits, f"--list {split}: no --split of that name")
        # Nothing is published about a user's own files, so no count is refused.
        self.published = dict.fromkeys(splits, Counts())
        self.paragraphs, self.match_captions = paragraphs, match_captions
        super().__init__(**kwargs)

    def inputs(self) -> tuple[pathlib.Path, ...]:
        """Return the annotation files and the lists."""
        return tuple(map(pathlib.Path, (*self.splits.values(), *self.lists.values())))

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield all that the file says about a clip or image together."""
        [path] = split_files(self.name, split, self.splits[split])
        wanted = self._listed(split)
        found = read_annotations(
            path,
            # A list says more than the file does: some name clips of all splits.
            None if wanted is not None else split,
            fields_of(self.fields),
            paragraphs=self.paragraphs,
            match_captions=self.match_captions,
        )
        return found if wanted is None else _select(found, wanted, path, self.lists[split])

    def _listed(self, split: str) -> list[str] | None:
        if split not in self.lists:
            return None
        path = pathlib.Path(self.lists[split])
        if not path.is_file():
            raise MissingError(f"{self.name}: list of split {split!r}: {path}: no such file")
        return read_ids(path)

    def media_names(self, annotation: Annotation) -> tuple[str, ...]:
        """Return the name, and those that files of numbered or YouTube clips have."""
        name = annotation.media
        # Numbers: MSR-VTT's and MSVD's clips; `v_`: ActivityNet's.
        prefixes = ("video", "vid") if name.isdecimal() else ("v_",)
        return (name, *(prefix + name for prefix in prefixes))


def read_annotations(
    path: pathlib.Path, split: str | None = None, fields: Fields = FIELDS, **options: bool
) -> Iterator[Annotation]:
    """Yield the annotations of a file in any form, one for each clip or image.

    Args:
      path: the file.
      split: see `read_rows`.
      fields: see `annotations_of`.
      **options: see `annotations_of`.

    Raises:
      UserError: a malformed entry; the message names file, entry and field.
    """
    rows = read_rows(path, split)
    parts = (annotations_of(entry, place, fields, **options) for place, entry in rows)
    found = itertools.chain.from_iterable(parts)
    # SQLite holds the pairs of pre-training, too many to be held in memory; each clip stands once.
    return found if form_of(path) == "sqlite" else merge(found)


def _select(
    annotations: Iterator[Annotation], wanted: list[str], path: pathlib.Path, list_path: object
) -> Iterator[Annotation]:
    """Yield the annotations of listed clips, in the order of the list."""
    found = {stem(item.media): item for item in annotations}
    for name in wanted:
        if stem(name) not in found:
            raise UserError(f"{list_path}: {name!r} is not in {path}")
        yield found[stem(name)]
