"""MSVD: 1,970 short YouTube clips with about 40 English captions each (Chen and Dolan 2011).

Videos: `videos/`, as in YouTubeClips.tar of www.cs.utexas.edu/users/ml/clamp/videoDescription
(`mv89psg6zh4_33_46.avi`). The formats were checked in the code of CLIP4Clip (retrieval) and of
Xu et al. 2017 (questions), and in public readers of the captions.
"""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.schema.checks import UserError
from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts
from data_pipelines.storage.builders.annotation_files import read_annotations
from data_pipelines.storage.builders.msrvtt import MsrvttQA

_PICKLE = "raw-captions.pkl"  # refused, with advice


class Msvd(AnnotatedBuilder):
    """Retrieval, with the splits of Venugopalan et al. 2015.

    Expects `train_list.txt`, `val_list.txt` and `test_list.txt` (a clip a line) and
    `AllVideoDescriptions.txt` (after lines with `#`: clip, space, caption) or CLIP4Clip's
    `raw-captions.pkl`, converted to `raw-captions.json`: a pickle can run code, so it is not read.
    How to convert it is said when the pickle lies there.
    """

    name = "msvd"
    origin = (
        "msvd_data.zip, release v0.0 of github.com/ArrowLuo/CLIP4Clip (lists), and "
        "www.cs.utexas.edu/users/ml/clamp/videoDescription (AllVideoDescriptions.txt)"
    )
    published: ClassVar = {
        "train": Counts(clips=1200),
        "val": Counts(clips=100),
        "test": Counts(clips=670),
    }

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield all captions of the listed clips."""
        listed = self.file(f"{split}_list.txt")
        captions = self._captions()
        for place, clip in readers.read_lines(listed):
            if clip not in captions:
                raise UserError(f"{place}: no caption of {clip} in AllVideoDescriptions.txt")
            yield Annotation(clip, place, captions=tuple(captions[clip]))

    def _captions(self) -> dict[str, list[str]]:
        if not self.optional_file("AllVideoDescriptions.txt"):
            # JSON first; the pickle is only opened to be refused with advice.
            for path in filter(None, map(self.optional_file, ("raw-captions.json", _PICKLE))):
                return {item.media: list(item.captions) for item in read_annotations(path)}
        captions: dict[str, list[str]] = {}
        for place, line in readers.read_lines(self.file("AllVideoDescriptions.txt")):
            if line.startswith("#"):
                continue
            clip, _, caption = line.partition(" ")
            if not caption:
                raise UserError(f"{place}: must be a clip, a space and a caption")
            captions.setdefault(clip, []).append(caption)
        return captions


class MsvdQA(MsrvttQA):
    """MSVD-QA: open questions made from the captions (Xu et al. 2017; counts: table 1).

    Expects `train_qa.json`, `val_qa.json` and `test_qa.json` (as `msrvtt_qa`; the number 1 is
    vid1) and `youtube_mapping.txt` (`mv89psg6zh4_33_46 vid1`). A video may have either name.
    """

    name = "msvd_qa"
    origin = "the MSVD-QA archive of github.com/xudejing/video-question-answering"
    published: ClassVar = {
        "train": Counts(clips=1200, questions=30_933),
        "val": Counts(clips=250, questions=6415),
        "test": Counts(clips=520, questions=13_157),
    }
    # Clips without a question are not in the files.
    editions: ClassVar = {
        "of the original archive, where 60 clips have no question": {
            "train": Counts(clips=1161, questions=30_933),
            "val": Counts(clips=245, questions=6415),
            "test": Counts(clips=504, questions=13_157),
        }
    }
    prefix = "vid"
    _clip_names: dict[str, str] | None = None

    def media_names(self, annotation: Annotation) -> tuple[str, ...]:
        """Return the name in the archive of the videos, and that in the questions."""
        # Read when a clip is looked for, in the preparation alone.
        if self._clip_names is None:
            self._clip_names = self._mapping()
        if annotation.media not in self._clip_names:
            raise UserError(f"{annotation.source}: no {annotation.media} in youtube_mapping.txt")
        return (self._clip_names[annotation.media], annotation.media)

    def _mapping(self) -> dict[str, str]:
        names = {}
        for place, line in readers.read_lines(self.file("youtube_mapping.txt")):
            clip, _, number = line.partition(" ")
            if not number:
                raise UserError(f"{place}: must be a clip, a space and its name in the questions")
            names[number.strip()] = clip
        return names
