"""Records without a caption are left out where one is needed, and counted."""

import json

import numpy as np
import pytest
from batches import take

from data_pipelines.loading import pipeline
from data_pipelines.loading.rows import PickedRecords
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.stored import open_source, read_texts

CAPTIONED = (1, 2, 5)
TRAP = 'a text that says "captions": [], "questions"'


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, write_clip):
    """Eight records of which three have captions; one of each is only in the second half."""
    folder = tmp_path_factory.mktemp("halves")
    lines = []
    for i in range(8):
        (folder / f"{i}.mp4").write_bytes(write_clip(range(0, 200 + 40 * i, 40)))
        captions = [f"{TRAP} {i}"] if i in CAPTIONED else []
        questions = [{"question": TRAP, "answer": "a"}]
        line = {"media": f"{i}.mp4", "id": str(i), "captions": captions, "questions": questions}
        lines.append(json.dumps(line))
    (folder / "m.jsonl").write_text("\n".join(lines))
    prepare("manifest", folder, name="half", splits={"train": folder / "m.jsonl"})
    return folder


def config_of(data_dir, split="train", **fields) -> DataConfig:
    options = {"batch_size": 6, "image_size": 16, "text_len": 8} | fields
    return DataConfig(
        train=(SourceConfig("half", split, num_frames=1),), data_dir=str(data_dir), **options
    )


def test_every_row_has_a_caption(data_dir, capsys):
    config = config_of(data_dir)
    for batch in take(config, 4):
        assert batch.valid.all() and (batch.text_mask.sum(axis=1) > 2).all()
        assert len(set(batch.media_ids.tolist())) == 3, "six rows are two epochs of three records"
    message = "data set 'half': split 'train': left out 5 of 8 without a caption"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "train[:50%]", "train[3:7]"])
def test_they_are_found_without_parsing(data_dir, split):
    texts = read_texts(SourceConfig("half", split), data_dir)
    expected = [i for i, item in enumerate(texts) if not item.captions]
    assert texts.without_captions().tolist() == expected != []


def test_records_of_an_older_version_are_asked_one_by_one(data_dir, monkeypatch):
    source = SourceConfig("half")
    records, texts = open_source(source, data_dir), list(read_texts(source, data_dir))
    picked = pipeline._captioned(records, source, str(data_dir))
    monkeypatch.setattr(pipeline, "read_texts", lambda *_: texts)
    again = pipeline._captioned(records, source, str(data_dir))
    assert isinstance(picked, PickedRecords) and len(picked) == 3
    np.testing.assert_array_equal(picked.places, again.places)
    assert all(picked[i]["captions"] for i in range(3))


def test_other_tasks_use_all_records(data_dir):
    config = config_of(data_dir, task="questions", batch_size=8)
    classes = pipeline.Classes({"a": {}})
    [batch] = take(config, 1, classes=classes)
    assert len(set(batch.media_ids.tolist())) == 8


def test_wrong_captions_are_no_empty_ones(data_dir):
    [batch] = take(config_of(data_dir, num_others=2, text_len=64), 1)
    lengths = batch.other_mask.sum(axis=2)
    assert lengths.any(), "some are found"
    assert ((lengths == 0) | (lengths > 2)).all()


def test_a_split_without_any_is_refused(data_dir):
    texts = read_texts(SourceConfig("half"), data_dir)
    first = next(i for i, item in enumerate(texts) if not item.captions)
    with pytest.raises(UserError, match=r"split .* has no captions, so "):
        take(config_of(data_dir, split=f"train[{first}:{first + 1}]"), 1)
