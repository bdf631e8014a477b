"""What to read and how: the data part of an experiment's config. Imports nothing of ours."""

from dataclasses import dataclass
from typing import Literal


def check(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds; the message names the field."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class SourceConfig:
    """One split of one prepared data set."""

    name: str = "shapes"
    """Data set: a folder under `data_dir` made by `python -m data_pipelines.prepare`."""
    split: str = "train"
    """Split, in TFDS notation ("train", "train[:90%]")."""
    num_frames: int = 4
    """Frames sampled from each clip; 1 for still images."""
    backwards: bool = False
    """Frames in reverse order, a control: shows what was learned about the order of time."""
    weight: float = 1.0
    """Share of the batches drawn from this source, relative to the other sources."""

    def __post_init__(self):
        check(self.num_frames >= 1, f"num_frames must be at least 1, not {self.num_frames}")
        check(self.weight > 0, f"weight must be positive, not {self.weight}")


@dataclass(frozen=True)
class DataConfig:
    """Where batches come from and what is done to each clip and caption."""

    train: tuple[SourceConfig, ...] = (SourceConfig(),)
    """Training sources; every batch comes from one of them, alternating by weight."""
    eval: SourceConfig = SourceConfig(split="test")
    """The split that evaluation reads, every clip once."""
    data_dir: str = "~/.cache/vlmae/data"
    """Folder of prepared data sets."""
    batch_size: int = 32
    """Clips in a global training batch (over all processes and devices)."""
    eval_batch_size: int = 32
    """Clips in a global evaluation batch."""
    image_size: int = 224
    """Height and width of a frame in pixels after cropping."""
    text_len: int = 32
    """Tokens of a caption with [CLS] and [SEP]; longer captions are cut."""
    num_others: int = 0
    """Wrong options that come with each training clip for multiple choice modeling: captions of
    other clips of the source, or those of the question; 0: it takes captions from the batch."""
    task: Literal["captions", "questions", "options", "labels"] = "captions"
    """What a row is about: a caption; a question, whose answer is a class; a question with the
    right option, and `num_others` wrong ones; or a caption and labels, which are classes."""
    answer_len: int = 0
    """Tokens of an answer with [CLS] and [SEP], for those who decode it; 0: none are made."""
    classes: str = ""
    """JSON file of classes; empty: the answers or labels of the training sources."""
    max_classes: int = 0
    """Only the most frequent classes of the training sources are told apart; 0: all of them."""
    tokenizer: str = ""
    """A vocab.txt or a folder with one or with tokenizer.json; empty: the first source's own."""
    min_crop_scale: float = 0.5
    """Smallest area of a random training crop, as a fraction of the frame; 1 switches it off."""
    flip: bool = True
    """Mirror half of the training clips; switch off where captions name left and right."""
    num_workers: int = 0
    """Worker processes that decode; 0 decodes in threads of the main process."""
    max_bad_ratio: float = 0.01
    """Largest share of undecodable clips that training tolerates before it stops."""

    def __post_init__(self):
        check(len(self.train) > 0, "data.train must name at least one source")
        for name in ("batch_size", "eval_batch_size", "image_size"):
            check(getattr(self, name) >= 1, f"data.{name} must be at least 1")
        check(self.text_len >= 3, f"data.text_len must be at least 3, not {self.text_len}")
        for name in ("num_workers", "num_others", "max_classes", "answer_len"):
            check(getattr(self, name) >= 0, f"data.{name} must not be negative")
        check(
            self.task in ("captions", "options") or not self.num_others,
            f"data.num_others={self.num_others} needs data.task=captions or options",
        )
        for name in ("min_crop_scale", "max_bad_ratio"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"data.{name} must be in [0, 1], not {value}")
        check(self.min_crop_scale > 0, "data.min_crop_scale must be above 0")
