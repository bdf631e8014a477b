"""DiDeMo: Flickr videos of at most 30 s with moments described (Hendricks et al. 2017).

Videos: `videos/`, under the names of the annotations with any ending (`a.mov` and `a.mov.mp4`
are both found as `a`). The format is that of github.com/LisaAnne/LocalizingMoments; how its
descriptions become paragraphs was checked in the code of CLIP4Clip.
"""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.builders import readers
from data_pipelines.builders.annotated import AnnotatedBuilder, Annotation, Counts, merge_paragraphs


class Didemo(AnnotatedBuilder):
    """Paragraph retrieval: all descriptions of a video, in the order of the file, are one caption.

    Expects `train_data.json`, `val_data.json` and `test_data.json`: lists of `video` and
    `description`. The counts are those of the original files (github.com/albanie/
    collaborative-experts, misc/datasets/didemo); lists of other systems lack a few videos.
    """

    name = "didemo"
    origin = "the folder data/ of github.com/LisaAnne/LocalizingMoments"
    published: ClassVar = {
        "train": Counts(clips=8395),
        "val": Counts(clips=1065),
        "test": Counts(clips=1004),
    }

    def annotations(self, split: str) -> Iterator[Annotation]:
        """One paragraph for each video."""
        return merge_paragraphs(self._descriptions(split))

    def _descriptions(self, split: str) -> Iterator[Annotation]:
        for place, entry in readers.read_entries(self.file(f"{split}_data.json")):
            media = readers.field(entry, "video", str, place)
            yield Annotation(media, place, (readers.field(entry, "description", str, place),))
