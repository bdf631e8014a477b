"""Texts of stored records without their media, and the classes counted from them."""

import dataclasses
import json

import pytest

from data_pipelines.schema.checks import MissingError
from data_pipelines.schema.classes import Classes, count_classes, load_classes
from data_pipelines.schema.config import SourceConfig
from data_pipelines.storage.class_counts import classes_for
from data_pipelines.storage.stored import read_texts


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
        ("[]", "must hold names, each once"),
        ("", "must hold names, each once"),
        ("cat\ncat\n", "must hold names, each once"),
        ("[3]", "must hold names, each once"),
        ("{}", "names no class"),
        (json.dumps({"cat": "dog"}), "class 'cat' must have a number, or an object of counts by"),
        (json.dumps({"cat": 0, "dog": 2}), "the numbers of its 2 names are not 0, 1, 2, ..."),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        load_classes(path)


@pytest.mark.parametrize(
    "text", ['{"up": 1, "red": 0, "sky": 2}', '["red", "up", "sky"]', "red\nup\n\nsky\r\n"]
)
def test_published_lists_are_read_and_counted(tmp_path, shapes_config, text):
    path = tmp_path / "answers"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_classes(path) == Classes({"red": {}, "up": {}, "sky": {}})
    config = dataclasses.replace(shapes_config, task="questions", classes=str(path))
    listed, own = classes_for(config), classes_for(dataclasses.replace(config, classes=""))
    assert listed.names == ("red", "up", "sky") and listed.counts["sky"] == {}
    assert listed.counts["red"] == own.counts["red"] != {}


def test_a_missing_list_is_named(tmp_path, shapes_config):
    config = dataclasses.replace(shapes_config, task="questions", classes=str(tmp_path / "none"))
    with pytest.raises(MissingError, match="none: no such file"):
        classes_for(config)


def test_sources_without_classes_are_named(shapes_config, monkeypatch):
    texts = read_texts(SourceConfig(), shapes_config.data_dir)
    bare = [text._replace(questions=()) for text in texts]
    monkeypatch.setattr("data_pipelines.storage.class_counts.read_texts", lambda *args: bare)
    with pytest.raises(ValueError, match=r"data\.task=questions, but shapes/train has none"):
        classes_for(dataclasses.replace(shapes_config, task="questions"))
