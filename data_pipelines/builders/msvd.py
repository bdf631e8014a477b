"""MSVD: 1,970 short YouTube clips with about 40 English captions each (Chen and Dolan 2011).

Videos: `videos/`, as in YouTubeClips.tar of www.cs.utexas.edu/users/ml/clamp/videoDescription
(`mv89psg6zh4_33_46.avi`). The formats were checked in the code of CLIP4Clip (retrieval) and of
Xu et al. 2017 (questions), and in public readers of the captions.
"""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.builders import readers
from data_pipelines.builders.annotated import AnnotatedBuilder, Annotation, Counts
from data_pipelines.builders.msrvtt import MsrvttQA


class Msvd(AnnotatedBuilder):
    """Retrieval, with the splits of Venugopalan et al. 2015.

    Expects `train_list.txt`, `val_list.txt` and `test_list.txt` (a clip a line) and
    `AllVideoDescriptions.txt` (after lines with `#`: clip, space, caption). CLIP4Clip reads the
    same captions from a pickle, which is not read here, because a pickle can run code.
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
        """All captions of the listed clips."""
        captions = self._captions()
        for place, clip in readers.read_lines(self.file(f"{split}_list.txt")):
            if clip not in captions:
                raise ValueError(f"{place}: no caption of {clip} in AllVideoDescriptions.txt")
            yield Annotation(clip, place, captions=tuple(captions[clip]))

    def _captions(self) -> dict[str, list[str]]:
        captions: dict[str, list[str]] = {}
        for place, line in readers.read_lines(self.file("AllVideoDescriptions.txt")):
            if line.startswith("#"):
                continue
            clip, _, caption = line.partition(" ")
            if not caption:
                raise ValueError(f"{place}: must be a clip, a space and a caption")
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
    prefix = "vid"
    _clip_names: dict[str, str] | None = None

    def media_names(self, annotation: Annotation) -> tuple[str, ...]:
        """The name in the archive of the videos, and that in the questions."""
        if self._clip_names is None:
            self._clip_names = self._mapping()
        if annotation.media not in self._clip_names:
            raise ValueError(f"{annotation.source}: no {annotation.media} in youtube_mapping.txt")
        return (self._clip_names[annotation.media], annotation.media)

    def _mapping(self) -> dict[str, str]:
        names = {}
        for place, line in readers.read_lines(self.file("youtube_mapping.txt")):
            clip, _, number = line.partition(" ")
            if not number:
                raise ValueError(f"{place}: must be a clip, a space and its name in the questions")
            names[number.strip()] = clip
        return names
