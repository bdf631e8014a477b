"""easy-VQA from wheels of the published layout: questions, kinds, counts, and what is refused."""

import collections
import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.schema.config import SourceConfig
from data_pipelines.schema.records import Question
from data_pipelines.storage.builders.annotation import Counts
from data_pipelines.storage.builders.easy_vqa import ANSWERS, EasyVqa, kind_of, read_split
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.stored import open_source, read_texts

QUESTIONS = {
    "train": [
        ["what is the blue shape?", "rectangle", 0],
        ["what color is the shape?", "blue", 0],
        ["does the image not contain a gray shape?", "yes", 0],
        ["is there a circle?", "no", 2],
        ["what is the color of the triangle?", "teal", 10],
    ],
    "test": [["what shape is present?", "circle", 0], ["is a red shape present?", "yes", 1]],
}
IMAGES = {"train": (0, 10, 2), "test": (0, 1)}  # as names, not as numbers, are sorted
COUNTS = {"train": Counts(3, None, 5), "test": Counts(2, None, 2)}


def write_wheel(path: Path, **changed: object) -> Path:
    """A wheel with the members of the real one; `changed` are questions by split."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("easy_vqa/__init__.py", "easy_vqa/data/.DS_Store", "easy_vqa/data/README.md"):
            archive.writestr(name, b"raise ImportError")
        for split, numbers in IMAGES.items():
            entries = json.dumps({**QUESTIONS, **changed}[split])
            archive.writestr(f"easy_vqa/data/{split}/questions.json", entries)
            for number in numbers:
                file = io.BytesIO()
                Image.new("RGB", (64, 64), (number, 0, 0)).save(file, "PNG")
                archive.writestr(f"easy_vqa/data/{split}/images/{number}.png", file.getvalue())
    return path


@pytest.fixture
def wheel(tmp_path):
    return write_wheel(tmp_path / "easy_vqa-1.0-py3-none-any.whl")


def test_one_example_is_one_image_with_all_its_questions(wheel):
    first, second, third = read_split(wheel, "train")
    assert [item.match_id for item in (first, second, third)] == ["train/0", "train/2", "train/10"]
    assert first.questions == (
        Question("what is the blue shape?", "rectangle", "shape"),
        Question("what color is the shape?", "blue", "color"),
        Question("does the image not contain a gray shape?", "yes", "yes/no"),
    )
    assert Image.open(io.BytesIO(third.media)).getpixel((0, 0)) == (10, 0, 0)
    assert third.source == f"{wheel.name}:easy_vqa/data/train/images/10.png"


def test_prepared_and_read_back_by_split_and_slice(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(EasyVqa, "published", COUNTS)
    folder = prepare("easy_vqa", tmp_path / "data", wheel=wheel)
    assert folder.parent == tmp_path / "data" / "easy_vqa"
    words = (folder / "vocab.txt").read_text().splitlines()
    assert {"rectangle", "color", "?"} <= set(words) and "present" not in words  # not from test
    sizes = {}
    for split in ("train", "test", "train[:67%]", "train[67%:]"):
        source = SourceConfig("easy_vqa", split, num_frames=1)
        sizes[split] = len(open_source(source, tmp_path / "data"))
        assert all(text.questions for text in read_texts(source, tmp_path / "data"))
    assert list(sizes.values()) == [3, 2, 2, 1]


def test_other_counts_are_refused(wheel, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"whl: split 'train' has 3 images and 5 questions, published are 4,000 and 38,575",
    ):
        prepare("easy_vqa", tmp_path, wheel=wheel)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["what?", "yes"], r"questions\.json\[1\]: must be \[question, answer, number of the"),
        (["is there a circle?", "blue", 0], r"\[1\]: 'blue' is no answer to 'is there a circle\?'"),
        (["what color is the shape?", "pink", 0], r"\[1\]: 'pink' is no answer"),
        (["is there a circle?", "yes", 7], r"\[1\]: there is no image 7"),
    ],
)
def test_malformed_entries_are_named(tmp_path, entry, message):
    wheel = write_wheel(tmp_path / "a.whl", train=[QUESTIONS["train"][0], entry])
    with pytest.raises(ValueError, match=message):
        list(read_split(wheel, "train"))


def test_files_of_another_kind_are_named(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"no zip file")
    with pytest.raises(ValueError, match=r"a\.whl: File is not a zip file"):
        list(read_split(tmp_path / "a.whl", "train"))
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as archive:
        archive.writestr("easy_vqa/__init__.py", b"")
    with pytest.raises(ValueError, match=r"b\.whl: easy_vqa/data/train/questions\.json: "):
        list(read_split(tmp_path / "b.whl", "train"))


@pytest.mark.network
def test_real_package_has_the_published_counts(tmp_path):
    """As the package's README states them: questions, those of yes or no, answers."""
    builder = EasyVqa(data_dir=tmp_path, cache_dir=tmp_path / "cache")
    splits = builder.examples()
    kinds = {
        split: collections.Counter(q.kind for item in items for q in item.questions)
        for split, items in splits.items()
    }
    assert {split: count["yes/no"] for split, count in kinds.items()} == {
        "train": 28_407,
        "test": 7136,
    }
    asked = [question for items in splits.values() for item in items for question in item.questions]
    answers = {question.answer for question in asked}
    assert answers == {answer for names in ANSWERS.values() for answer in names}
    assert len(answers) == 13
    assert all(question.answer in ANSWERS[kind_of(question.question)] for question in asked)
