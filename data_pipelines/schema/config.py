"""The data part of an experiment's config: sources of clips, and their form in a batch."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import MinLen

from data_pipelines.schema.checks import check, check_folder_name
from data_pipelines.schema.fields import Checked, Count, Positive, Rate, Share, Size


@dataclass(frozen=True)
class SourceConfig(Checked):
    """A split of a prepared data set."""

    name: str = "shapes"
    """Data set: a folder under `data_dir` made by `vlmae prepare`."""
    split: str = "train"
    """Split, in TFDS notation ("train", "train[:90%]")."""
    num_frames: Size = 4
    """Frames sampled from each clip; 1 for still images."""
    backwards: bool = False
    """Frames in reverse order, as a control for what was learned about the order of time."""
    weight: Positive = 1.0
    """Share of the batches drawn from this source, relative to the other sources."""

    def check_together(self) -> None:
        """Check that the data set lies in `data_dir`, and nowhere else."""
        if self.name:
            check_folder_name(self.name, "--name")


@dataclass(frozen=True)
class DataConfig(Checked):
    """Sources of batches, and the processing of clips and texts."""

    train: Annotated[tuple[SourceConfig, ...], MinLen(1)] = (SourceConfig(),)
    """Training sources; every batch comes from one of them, alternating by weight."""
    eval: SourceConfig = SourceConfig(name="", split="test")
    """Evaluation source; every clip is read once. An empty name is that of the first training
    source."""
    data_dir: str = "~/.cache/vlmae/data"
    """Folder of prepared data sets."""
    batch_size: Size = 32
    """Clips in a global training batch (over all processes and devices)."""
    eval_batch_size: Size = 32
    """Clips in a global evaluation batch."""
    image_size: Size = 224
    """Height and width of a frame in pixels after cropping."""
    train_size: Count = 0
    """Height and width of a training frame, if it is not `image_size`; 0: it is."""
    text_len: Count = 32
    """Tokens of a caption with [CLS] and [SEP]; longer captions are cut. 0: as many as the longest
    text of training has, up to a multiple of 8 and no more than `model.text.max_len`."""
    num_others: Count = 0
    """Wrong options with each training clip for multiple choice modeling: captions of other clips
    of the source, or those of the question; 0 takes captions of other clips of the batch."""
    task: Literal["captions", "questions", "options", "labels"] = "captions"
    """Texts and targets of a row. captions: a caption; questions: a question, whose answer is a
    class; options: a question with its right option and `num_others` wrong ones; labels: a caption,
    and labels, which are classes."""
    answer_len: Count = 0
    """Tokens of an answer with [CLS] and [SEP], for the answer decoder; 0 makes none."""
    classes: str = ""
    """File of classes, such as ALPRO's `train_ans2label.json` or a name in each line; empty: the
    answers or labels of the training sources."""
    max_classes: Count = 0
    """Number of most frequent classes of the training sources to use; 0 uses all."""
    tokenizer: str = ""
    """A vocab.txt or a folder with one or with tokenizer.json; empty: the first source's own."""
    min_crop_scale: Rate = 0.5
    """Smallest area of a random training crop, as a fraction of the frame; 1 switches it off."""
    flip: bool = True
    """Mirror half of the training clips; switch off where captions name left and right."""
    color_jitter: Share = 0.0
    """Change brightness, contrast and saturation of training clips, each by a random factor of up
    to 1 plus or minus this, in random order, alike for all frames; 0: none, as in SMAUG's base."""
    num_workers: Count = 0
    """Processes that decode clips; 0 decodes in threads of the main process."""
    max_bad_ratio: Share = 0.01
    """Largest share of undecodable clips that training tolerates before it stops."""

    def check_together(self) -> None:
        """Check names of sources, room for texts, and that the task has options."""
        check(all(source.name for source in self.train), "--train needs a name for each source")
        check(self.text_len not in (1, 2), f"--text-len={self.text_len} is less than 3")
        check(
            self.task in ("captions", "options") or not self.num_others,
            f"--num-others={self.num_others} needs --task=captions or --task=options",
        )

    @property
    def eval_source(self) -> SourceConfig:
        """The evaluation source with its name."""
        name = self.eval.name or self.train[0].name
        return dataclasses.replace(self.eval, name=name)

    @property
    def frame_size(self) -> int:
        """Height and width of a training frame in pixels."""
        return self.train_size or self.image_size
