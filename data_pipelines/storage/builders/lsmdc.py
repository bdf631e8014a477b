"""LSMDC: movie clips of a few seconds with one sentence each (Rohrbach et al. 2017).

Videos: `videos/`, as distributed (`<movie>/<clip>.avi`; access is granted by MPII). Format and
splits were checked in the code of CLIP4Clip.
"""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts, merge

FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}
COLUMNS = (
    "clip",
    "start_aligned",
    "end_aligned",
    "start_extracted",
    "end_extracted",
    "sentence",
)


class Lsmdc(AnnotatedBuilder):
    """Retrieval on the 1,000 clips of the public test.

    Expects `LSMDC16_annos_training.csv`, `LSMDC16_annos_val.csv` and
    `LSMDC16_challenge_1000_publictect.csv`: six columns between tabs without a header, first the
    clip and last the sentence. A few training clips have more than one sentence.
    """

    name = "lsmdc"
    origin = "sites.google.com/site/describingmovies/download"
    published: ClassVar = {
        "train": Counts(captions=101_079),
        "val": Counts(captions=7408),
        "test": Counts(clips=1000, captions=1000),
    }

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield all sentences about a clip together."""
        return merge(self._sentences(split))

    def _sentences(self, split: str) -> Iterator[Annotation]:
        path = self.file(FILES[split])
        rows = readers.read_table(path, COLUMNS, delimiter="\t", header=False, quoted=False)
        for place, row in rows:
            yield Annotation(row["clip"].strip(), place, (row["sentence"],))
