"""Something-Something v2 as retrieval (Lei et al. 2022): clips that need temporal modeling.

Videos: `videos/<number>.webm`, from 20bn-something-something-v2 (developer.qualcomm.com). Format
and splits are those of github.com/jayleicn/singularity; the counts are those of its paper.
"""

from collections.abc import Iterator
from typing import ClassVar

from data_pipelines.storage.builders.annotated import AnnotatedBuilder
from data_pipelines.storage.builders.annotation import Annotation, Counts
from data_pipelines.storage.builders.annotation_files import read_annotations


class Ssv2Label(AnnotatedBuilder):
    """Captions with objects ("holding a potato"); clips of equal caption match each other.

    Expects `ssv2_ret_label_train.json` and `ssv2_ret_label_val_small.json`: lists of `video` (a
    file name or a list of them) and `caption`.
    """

    name = "ssv2_label"
    origin = "anno_downstream.tar.gz of github.com/jayleicn/singularity"
    published: ClassVar = {"train": Counts(clips=168_913), "val": Counts(clips=2088)}
    caption_type = "label"

    def annotations(self, split: str) -> Iterator[Annotation]:
        """Yield one caption for each clip."""
        suffix = {"train": "train", "val": "val_small"}[split]
        path = self.file(f"ssv2_ret_{self.caption_type}_{suffix}.json")
        return read_annotations(path, match_captions=True)


class Ssv2Template(Ssv2Label):
    """The 174 templates without objects ("Holding [something]"); 12 clips of each in `val`.

    Expects `ssv2_ret_template_train.json` and `ssv2_ret_template_val_small.json`, as
    `ssv2_label`.
    """

    name = "ssv2_template"
    caption_type = "template"
