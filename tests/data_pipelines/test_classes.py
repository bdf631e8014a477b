"""Texts of stored records without their media, and the classes counted from them."""

import dataclasses
import json

import pytest

from data_pipelines import stored
from data_pipelines.classes import Classes, classes_for, count_classes, load_classes
from data_pipelines.config import SourceConfig
from data_pipelines.stored import open_source, read_texts


def test_texts_are_those_of_the_records_and_read_once(shapes_dir, monkeypatch):
    source = SourceConfig("shapes", "train[:50%]")
    records, texts = open_source(source, shapes_dir), read_texts(source, shapes_dir)
    assert len(records) == len(texts) == 12
    for record, text in zip(records, texts, strict=True):
        assert text.match_id == record["match_id"].decode()
        assert text.source == record["source"].decode()
        assert text.captions == [caption.decode() for caption in record["captions"]]
        assert text.labels == [label.decode() for label in record["labels"]]
        assert [q.question.encode() for q in text.questions] == record["questions"]["question"]
        assert text.questions == stored.questions_of(record)

    def refuse(*args):
        raise AssertionError("the media are read again")

    monkeypatch.setattr(stored, "open_source", refuse)
    assert read_texts(source, shapes_dir) == texts
    with pytest.raises(AssertionError):
        read_texts(SourceConfig("shapes", "train[50%:]"), shapes_dir)


def test_a_folder_that_cannot_be_written(shapes_dir, monkeypatch):
    def refuse(*args):
        raise PermissionError("read-only")

    source = SourceConfig("shapes", "train[:25%]")
    monkeypatch.setattr(stored.pathlib.Path, "write_text", refuse)
    assert read_texts(source, shapes_dir) == read_texts(source, shapes_dir)


def test_classes_are_counted_by_kind_most_frequent_first():
    named = [("cat", "what"), ("dog", "what"), ("dog", "who"), ("red", "color"), ("cat", "what")]
    classes = count_classes([*named, ("dog", "what"), ("blue", "color")])
    assert classes.names == ("dog", "cat", "blue", "red")
    assert classes.counts["dog"] == {"what": 2, "who": 1}
    assert [classes.most_frequent(kind) for kind in ("who", "color")] == ["dog", "blue"]
    assert count_classes(named, limit=1).names == ("cat",)


def test_classes_of_a_task(shapes_config):
    assert classes_for(shapes_config) is None
    assert classes_for(dataclasses.replace(shapes_config, task="options")) is None
    answers = classes_for(dataclasses.replace(shapes_config, task="questions"))
    asked = [
        q for text in read_texts(SourceConfig(), shapes_config.data_dir) for q in text.questions
    ]
    assert sum(sum(kinds.values()) for kinds in answers.counts.values()) == len(asked) == 24 * 6
    assert {(q.answer, q.kind) for q in asked} == {
        (name, kind) for name, kinds in answers.counts.items() for kind in kinds
    }
    labels = classes_for(dataclasses.replace(shapes_config, task="labels", max_classes=3))
    assert len(labels.names) == 3 and all(set(kinds) == {""} for kinds in labels.counts.values())


def test_classes_survive_their_file(tmp_path, shapes_config):
    classes = Classes({"Ärztin": {"who": 2}, "a, b": {}})
    classes.save(tmp_path / "run")
    path = tmp_path / "run" / "classes.json"
    assert load_classes(path) == classes and load_classes(path).names == classes.names
    config = dataclasses.replace(shapes_config, task="questions", classes=str(path))
    assert classes_for(config) == classes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object with a name for each class"),
        ("{}", "must be a JSON object with a name for each class"),
        (json.dumps({"cat": 3}), "class 'cat' must have an object of counts by kind"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        load_classes(path)


def test_sources_without_classes_are_named(shapes_config, monkeypatch):
    texts = read_texts(SourceConfig(), shapes_config.data_dir)
    bare = [dataclasses.replace(text, questions=[]) for text in texts]
    monkeypatch.setattr("data_pipelines.classes.read_texts", lambda *args: bare)
    with pytest.raises(ValueError, match=r"data\.task=questions, but shapes/train has none"):
        classes_for(dataclasses.replace(shapes_config, task="questions"))
