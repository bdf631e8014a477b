"""MSR-VTT in the published formats, read through the real builders."""

import dataclasses

import pytest
from published_sets import FILES, MEDIA, MSRVTT_VIDEOS

from data_pipelines.loading.evaluation import eval_data
from data_pipelines.loading.pipeline import train_batches
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.records import Question
from data_pipelines.storage.class_counts import classes_for
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.stored import read_texts


@pytest.mark.parametrize(("name", "num_train"), [("msrvtt_9k", 2), ("msrvtt_7k", 1)])
def test_retrieval(manual_dir, read_back, name, num_train):
    splits = read_back(name, manual_dir(FILES[name], MEDIA[name]))
    captions = {item.match_id: item.captions for item in splits["train"]}
    assert captions["video0"] == ["a car is shown", "a red car"] and len(captions) == num_train
    [test] = splits["test"]
    assert test.match_id == "video9770" and test.captions == ["a man, talking"]
    assert test.source.endswith("MSRVTT_JSFUSION_test.csv:2")


@pytest.mark.parametrize(
    ("train_list", "message"),
    [
        ("id\nvideo0\n", "MSRVTT_train.9k.csv:1: column 'video_id' is missing"),
        ("video_id\nvideo0,x\n", "MSRVTT_train.9k.csv:2: must have 1 fields"),
        ("video_id\nvideo0\nvideo5\n", "MSRVTT_train.9k.csv:3: no caption of video5"),
    ],
)
def test_malformed_lists_are_named(tmp_path, manual_dir, train_list, message):
    files = FILES["msrvtt_9k"] | {"MSRVTT_train.9k.csv": train_list}
    folder = manual_dir(files, MSRVTT_VIDEOS)
    with pytest.raises(ValueError, match=message):
        prepare("msrvtt_9k", tmp_path, manual_dir=folder, allow_other_counts=True)


def test_questions(manual_dir, read_back):
    splits = read_back("msrvtt_qa", manual_dir(FILES["msrvtt_qa"], MSRVTT_VIDEOS))
    assert [item.match_id for item in splits["train"]] == ["video0", "video1"]
    assert splits["train"][0].questions == [
        Question("what is being shown?", "car", "what"),
        Question("is it red?", "yes", "other"),
    ]
    assert splits["val"][0].captions == []


def test_data_without_captions_train_on_questions_only(tmp_path, manual_dir, read_back):
    entry = {"question": "what talks?", "answer": "man", "video_id": 0}
    files = {f"{split}_qa.json": [entry] for split in ("train", "val", "test")}
    read_back("msrvtt_qa", manual_dir(files, MSRVTT_VIDEOS))
    config = DataConfig(
        train=(SourceConfig("msrvtt_qa"),),
        eval=SourceConfig("msrvtt_qa", "test"),
        data_dir=str(tmp_path / "data"),
        batch_size=1,
        eval_batch_size=1,
        image_size=32,
        task="questions",
    )
    classes = classes_for(config)
    with train_batches(config, 0, seed=0, classes=classes) as batches:
        assert next(batches).targets.tolist() == [[True]]
    data = eval_data(config, classes)
    assert data.questions.answers == ("man",) and data.texts.captions == ()
    assert [batch.valid.tolist() for batch in data.batches()] == [[True]]
    with pytest.raises(ValueError, match="data set 'msrvtt_qa': split 'train' has no captions"):
        train_batches(dataclasses.replace(config, task="captions"), 0, seed=0)


def test_options_survive_the_kept_texts(tmp_path, manual_dir, read_back):
    entry = {"video": "video0.mp4", "caption": ["a cat", "a dog"], "answer": 1}
    folder = manual_dir({"msrvtt_mc_test.json": [entry]}, MSRVTT_VIDEOS)
    [example] = read_back("msrvtt_mc", folder)["test"]
    [texts] = read_texts(SourceConfig("msrvtt_mc", "test"), tmp_path / "data")
    assert list(texts.questions) == example.questions


def test_multiple_choice(tmp_path, manual_dir, read_back):
    [entry] = FILES["msrvtt_mc"]["msrvtt_mc_test.json"]
    options = tuple(entry["caption"])
    folder = manual_dir(FILES["msrvtt_mc"], MSRVTT_VIDEOS)
    [example] = read_back("msrvtt_mc", folder)["test"]
    assert example.questions == [Question("", "a man talks", "multiple choice", options)]
    assert example.captions == ["a man talks"]
    manual_dir({"msrvtt_mc_test.json": [entry | {"answer": 5}]})
    with pytest.raises(ValueError, match=r"\[0\]: field 'answer' must be one of 0 to 4"):
        prepare("msrvtt_mc", tmp_path, manual_dir=folder, allow_other_counts=True)
