"""easy-VQA: questions about one shape in one color, the smallest real test of answering (MIT).

4,000 training and 1,000 test images of 64 px show a rectangle, circle or triangle in one of eight
colors; 38,575 and 9,673 questions have 13 answers (github.com/vzhou842/easy-VQA, version 1.0). A
small convolutional network answers nearly all of them, so a model that does not has a defect.

The images come in a Python package, which is fetched by the user's own pip, checked by SHA-256,
read as a zip file, and never imported or installed.

There is no published val split. One example is one image with all of its questions, and records lie
in a fixed random order, so a slice holds out images that training never shows:

    --data.train.0.split "train[:95%]" --data.eval.split "train[95%:]"
"""

import collections
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import ClassVar

from data_pipelines.offline.fetch import DEFAULT_CACHE_DIR, fetch
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Example, Question
from data_pipelines.storage.builders.annotation import Counts
from data_pipelines.storage.builders.base import VideoTextBuilder

PACKAGE = "easy-vqa"
ROOT = "easy_vqa/data"
ANSWERS = {
    "yes/no": ("yes", "no"),
    "shape": ("rectangle", "circle", "triangle"),
    "color": ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow"),
}


class EasyVqa(VideoTextBuilder):
    """Images without captions, each with about ten questions; splits `train` and `test`."""

    name = "easy_vqa"
    published: ClassVar[Mapping[str, Counts]] = {
        "train": Counts(clips=4000, questions=38_575),
        "test": Counts(clips=1000, questions=9673),
    }

    def __init__(
        self,
        *,
        wheel: str | Path | None = None,
        cache_dir: str | Path = DEFAULT_CACHE_DIR,
        **kwargs,
    ):
        """Take the package's wheel, which is fetched into `cache_dir` unless given."""
        super().__init__(**kwargs)
        self.wheel = wheel
        self.cache_dir = cache_dir

    def examples(self) -> dict[str, list[Example]]:
        """Read one example for each image, by its number.

        Raises:
          MissingError: the package cannot be fetched.
          UserError: another layout or other counts than the published ones; names the file.
        """
        path = Path(self.wheel or fetch("easy_vqa", self.cache_dir)[PACKAGE])
        splits = {split: list(read_split(path, split)) for split in self.published}
        for split, examples in splits.items():
            found = Counts(len(examples), None, sum(len(item.questions) for item in examples))
            # Exactly: one version of the package is meant, and a changed file would show here.
            if found != self.published[split]:
                raise UserError(
                    f"{path}: split {split!r} has {found.clips:,} images and {found.questions:,} "
                    f"questions, published are {self.published[split].clips:,} and "
                    f"{self.published[split].questions:,}"
                )
        return splits


def read_split(wheel: Path, split: str) -> Iterator[Example]:
    """Read the images of a split by their numbers, each with its questions in order.

    Raises:
      UserError: no zip file, another layout, an unknown answer, or a question about an image that
        is not there; the message names file and entry.
    """
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel}: {error}") from error
    with archive:
        images = _image_names(archive, f"{ROOT}/{split}/images")
        questions = _read_questions(archive, wheel, f"{ROOT}/{split}/questions.json", images)
        for number, name in sorted(images.items()):
            yield Example(
                media=archive.read(name),
                media_type="image",
                captions=(),
                # Numbers start anew in each split.
                match_id=f"{split}/{number}",
                source=f"{wheel.name}:{name}",
                questions=tuple(questions[number]),
            )


def kind_of(question: str) -> str:
    """Return "color" or "shape" for a question with "what", "yes/no" for any other.

    >>> kind_of("what is the color of the circle?"), kind_of("what is the blue shape?")
    ('color', 'shape')
    >>> kind_of("is there not a red shape?")
    'yes/no'
    """
    if not question.startswith("what "):
        return "yes/no"
    return "color" if question.startswith(("what color ", "what is the color ")) else "shape"


def _image_names(archive: zipfile.ZipFile, folder: str) -> dict[int, str]:
    """Return the PNG files of a folder, which are named by their numbers."""
    paths = map(PurePosixPath, archive.namelist())
    return {
        int(path.stem): str(path)
        for path in paths
        if str(path.parent) == folder and path.suffix == ".png" and path.stem.isdecimal()
    }


def _read_questions(
    archive: zipfile.ZipFile, wheel: Path, name: str, images: Mapping[int, str]
) -> dict[int, list[Question]]:
    """Read the questions about each image: a list of [question, answer, number of the image]."""
    try:
        entries = json.loads(archive.read(name))
    except (KeyError, ValueError) as error:  # no such member, or no JSON
        raise UserError(f"{wheel}: {name}: {error}") from error
    questions: dict[int, list[Question]] = collections.defaultdict(list)
    for index, entry in enumerate(entries):
        place = f"{wheel}: {name}[{index}]"
        # The form is fixed, so anything else is a damaged file and no edition.
        match entry:
            case [str(question), str(answer), int(number)]:
                questions[number].append(_question(question, answer, place))
            case _:
                raise UserError(f"{place}: must be [question, answer, number of the image]")
        if number not in images:
            raise UserError(f"{place}: there is no image {number}")
    return questions


def _question(question: str, answer: str, place: str) -> Question:
    kind = kind_of(question)
    if answer not in ANSWERS[kind]:
        raise UserError(f"{place}: {answer!r} is no answer to {question!r}")
    return Question(question, answer, kind)
