"""DiDeMo: Flickr videos of at most 30 s with moments described (Hendricks et al. 2017).

Videos: `videos/`, under the names of the annotations with any ending (`a.mov` and `a.mov.mp4`
are both found as `a`). The format is that of github.com/LisaAnne/LocalizingMoments; how its
descriptions become paragraphs was checked in the code of CLIP4Clip.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.media.endings import stem
from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts, merge_paragraphs


class Didemo(AnnotatedBuilder):
    """Paragraph retrieval: all descriptions of a video, in the order of the file, are one caption.

    Expects `train_data.json`, `val_data.json` and `test_data.json`: lists of `video` and
    `description`. A few videos are named twice there, as `.mov` and as `.mp4`. With the lists of
    github.com/albanie/collaborative-experts (misc/datasets/didemo) beside them, `train_list.txt`,
    `val_list.txt` and `test_list.txt`, only descriptions under the listed name count, as in
    CLIP4Clip. Without a list, the descriptions under both names make one paragraph.
    """

    name = "didemo"
    origin = "the folder data/ of github.com/LisaAnne/LocalizingMoments"
    published: ClassVar = {
        "train": Counts(clips=8395),
        "val": Counts(clips=1065),
        "test": Counts(clips=1004),
    }
    editions: ClassVar = {"of collaborative-experts' list": {"train": Counts(clips=8392)}}

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield one paragraph for each video."""
        # The list decides which of two names counts, and figures of others were made with it.
        listed = self._listed(split)
        if listed is not None:
            found = (item for item in self._descriptions(split) if item.media in listed)
            return merge_paragraphs(found)
        return merge_paragraphs(_join_stems(self._descriptions(split)))

    def _check_counts(self, split: str) -> None:
        super()._check_counts(split)
        if self._listed(split) is None:
            names = {item.media for item in self._descriptions(split)}
            twice = len(names) - len(set(map(stem, names)))
            if twice:
                print(
                    f"{self.name}: split {split!r}: {twice} videos are named twice (.mov, .mp4); "
                    "the descriptions under both names make one paragraph. CLIP4Clip takes those "
                    f"under the name in {split}_list.txt of collaborative-experts only",
                    file=sys.stderr,
                )

    def _listed(self, split: str) -> set[str] | None:
        """Return the names in the list of a split, None without a list."""
        path = self.optional_file(f"{split}_list.txt")
        return path and {line for _, line in readers.read_lines(path)}

    def _descriptions(self, split: str) -> Iterator[Annotation]:
        for place, entry in readers.read_entries(self.file(f"{split}_data.json")):
            media = readers.field(entry, "video", str, place)
            yield Annotation(media, place, (readers.field(entry, "description", str, place),))


def _join_stems(annotations: Iterator[Annotation]) -> Iterator[Annotation]:
    """Give all names of a video the one that comes first."""
    names: dict[str, str] = {}
    for item in annotations:
        yield dataclasses.replace(item, media=names.setdefault(stem(item.media), item.media))
