"""MSR-VTT in the published formats, read through the real builders."""

import dataclasses

import pytest

from data_pipelines.classes import classes_for
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.evaluation import eval_data
from data_pipelines.pipeline import train_batches
from data_pipelines.prepare import prepare
from data_pipelines.records import Question
from data_pipelines.stored import read_texts

VIDEOS = [f"videos/video{number}.mp4" for number in (0, 1, 9770)]


def retrieval_files(train_list="video_id\nvideo0\nvideo1\n"):
    sentences = [
        {"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
        {"caption": "a dog barks", "video_id": "video1", "sen_id": 1},
        {"caption": "a red car", "video_id": "video0", "sen_id": 2},
        {"caption": "a man talks", "video_id": "video9770", "sen_id": 3},
    ]
    videos = [{"category": 9, "url": "https://www.youtube.com/watch?v=9lZi22qLlEo", "id": 0}]
    test = 'key,vid_key,video_id,sentence\nret0,msr9770,video9770,"a man, talking"\n'
    return {
        "MSRVTT_data.json": {"info": {}, "videos": videos, "sentences": sentences},
        "MSRVTT_train.9k.csv": train_list,
        "MSRVTT_train.7k.csv": "video_id\nvideo0\n",
        "MSRVTT_JSFUSION_test.csv": test,
    }


@pytest.mark.parametrize(("name", "num_train"), [("msrvtt_9k", 2), ("msrvtt_7k", 1)])
def test_retrieval(manual_dir, read_back, name, num_train):
    splits = read_back(name, manual_dir(retrieval_files(), VIDEOS))
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
    folder = manual_dir(retrieval_files(train_list), VIDEOS)
    with pytest.raises(ValueError, match=message):
        prepare("msrvtt_9k", tmp_path, manual_dir=folder, allow_other_counts=True)


def test_questions(manual_dir, read_back):
    def entry(video_id, question, answer):
        fields = {"answer": answer, "category_id": 14, "id": 0}
        return fields | {"question": question, "video_id": video_id}

    train = [
        entry(0, "what is being shown?", "car"),
        entry(1, "who barks?", "dog"),
        entry(0, "is it red?", "yes"),
    ]
    test = [entry(9770, "what talks?", "man")]
    files = {"train_qa.json": train, "val_qa.json": test, "test_qa.json": test}
    splits = read_back("msrvtt_qa", manual_dir(files, VIDEOS))
    assert [item.match_id for item in splits["train"]] == ["video0", "video1"]
    assert splits["train"][0].questions == [
        Question("what is being shown?", "car", "what"),
        Question("is it red?", "yes", "other"),
    ]
    assert splits["val"][0].captions == []


def test_data_without_captions_train_on_questions_only(tmp_path, manual_dir, read_back):
    entry = {"question": "what talks?", "answer": "man", "video_id": 0}
    files = {f"{split}_qa.json": [entry] for split in ("train", "val", "test")}
    read_back("msrvtt_qa", manual_dir(files, VIDEOS))
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
    folder = manual_dir({"msrvtt_mc_test.json": [entry]}, VIDEOS)
    [example] = read_back("msrvtt_mc", folder)["test"]
    for _ in range(2):  # from the records, then from the file that keeps them
        [texts] = read_texts(SourceConfig("msrvtt_mc", "test"), tmp_path / "data")
        assert texts.questions == example.questions


def test_multiple_choice(tmp_path, manual_dir, read_back):
    options = ["a cat", "a man talks", "a car", "a dog", "a song"]
    entry = {"video": "video9770.mp4", "caption": options, "answer": 1}
    folder = manual_dir({"msrvtt_mc_test.json": [entry]}, VIDEOS)
    [example] = read_back("msrvtt_mc", folder)["test"]
    assert example.questions == [Question("", "a man talks", "multiple choice", tuple(options))]
    assert example.captions == ["a man talks"]
    manual_dir({"msrvtt_mc_test.json": [entry | {"answer": 5}]})
    with pytest.raises(ValueError, match=r"\[0\]: field 'answer' must be one of 0 to 4"):
        prepare("msrvtt_mc", tmp_path, manual_dir=folder, allow_other_counts=True)
