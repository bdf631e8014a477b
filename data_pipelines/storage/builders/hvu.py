"""HVU: clips of Kinetics and others with many labels each (Diba et al. 2020).

Videos: `videos/<YouTube id>_<start>_<end>` with any ending, times with six digits: in tenths of a
second, as the download script of mmaction2 (`tools/data/hvu`) names them, or in whole seconds and
with one more `_`, as the data set's own HVU-Downloader does. Both were checked in that code.
"""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.schema.checks import UserError
from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts


class Hvu(AnnotatedBuilder):
    """Multi-label classification over 3,142 tags of scenes, objects, actions, events, ...

    Expects `HVU_Train_V1.0.csv` and `HVU_Val_V1.0.csv` with the columns `Tags` (between them |),
    `youtube_id`, `time_start` and `time_end` (seconds). The test labels are not published; train
    and val hold about 481,000 and 31,000 clips (not checked). Many videos are gone: expect to
    need `--max-bad-ratio`.
    """

    name = "hvu"
    origin = "github.com/holistic-video-understanding/HVU-Dataset (HVU_Train_V1.0.zip, ...)"
    published: ClassVar = {"train": Counts(), "val": Counts()}
    columns = ("Tags", "youtube_id", "time_start", "time_end")
    files: ClassVar = {"train": "HVU_Train_V1.0.csv", "val": "HVU_Val_V1.0.csv"}

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Return the tags of each clip."""
        for place, row in readers.read_table(self.file(self.files[split]), self.columns):
            start, end = (_tenths(row, name, place) for name in ("time_start", "time_end"))
            labels = tuple(filter(None, row["Tags"].split("|")))
            yield Annotation(f"{row['youtube_id']}_{start:06d}_{end:06d}", place, labels=labels)

    def media_names(self, annotation: Annotation) -> tuple[str, ...]:
        """Return the names of both download scripts."""
        video, start, end = annotation.media.rsplit("_", 2)
        return (annotation.media, f"{video}_{int(start) // 10:06d}_{int(end) // 10:06d}_")


def _tenths(row: dict[str, str], name: str, place: str) -> int:
    try:
        # As a float first: some tables hold 12.0 where others hold 12.
        return int(float(row[name]) * 10)
    except ValueError:
        raise UserError(f"{place}: field {name!r} must be seconds, not {row[name]!r}") from None
