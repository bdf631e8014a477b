"""Data sets whose clips are stored as pictures, from their preparation to batches."""

import dataclasses
import json
import os

import numpy as np
import pytest
from batches import assert_equal, take

from data_pipelines.loading import rows
from data_pipelines.loading.evaluation import eval_data
from data_pipelines.media.reencode import Reencode
from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.storage import pictures
from data_pipelines.storage.pictures import pictures_path
from data_pipelines.storage.prepare import parse_args, prepare
from data_pipelines.storage.stored import fingerprint, open_source, read_form

FORM = Reencode(store="frames", fps=8)
NUM_CLIPS = 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory, write_clip):
    """A folder of clips, with a manifest of all and one of two more."""
    folder = tmp_path_factory.mktemp("clips")
    for name, numbers in {"train": range(NUM_CLIPS), "more": range(10, 12)}.items():
        for i in numbers:
            (folder / f"{i}.mp4").write_bytes(write_clip(range(0, 1000 + 200 * i, 40), bf=0))
        lines = [json.dumps({"media": f"{i}.mp4", "caption": f"clip {i}"}) for i in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def options(clips, split="train"):
    return {"name": "mine", "splits": {split: clips / "train.jsonl"}, "num_shards": 2}


@pytest.fixture
def data_dir(tmp_path, clips):
    prepare("manifest", tmp_path, reencode=FORM, **options(clips))
    return tmp_path


def config(data_dir, **fields):
    fields = {"batch_size": 3, "image_size": 32, "text_len": 8, "max_bad_ratio": 1.0} | fields
    source = SourceConfig("mine", num_frames=3)
    test = dataclasses.replace(source, split="train")
    return DataConfig(train=(source,), eval=test, data_dir=str(data_dir), **fields)


def error(video, other):
    """Mean squared error of pixels; 30 is 33 dB."""
    return np.mean((video.astype(float) - other) ** 2)


def files(folder):
    return sorted(folder.glob("*.pictures"))


def test_a_clip_trains_the_same_from_either_form(data_dir, clips, tmp_path):
    """But for compression: the same draws, so the same frames, crops, flips and captions."""
    video = tmp_path / "video"
    prepare("manifest", video, reencode=Reencode(fps=8), **options(clips))
    for own, other in zip(take(config(data_dir), 6), take(config(video), 6), strict=True):
        assert_equal([own._replace(video=other.video)], [other])
        assert own.valid.all() and error(own.video, other.video) < 30
    own, other = eval_data(config(data_dir)), eval_data(config(video))
    assert own.names == other.names
    for row in range(NUM_CLIPS):
        assert error(own.clip(row), other.clip(row)) < 30


@pytest.mark.e2e
def test_workers_and_restarts_change_nothing(data_dir):
    unbroken = take(config(data_dir), 6)
    assert_equal(take(config(data_dir), 3, start_step=3), unbroken[3:])
    assert_equal(take(config(data_dir, num_workers=2), 4, start_step=2), unbroken[2:])


@pytest.mark.e2e
def test_workers_prepare_the_same(data_dir, clips, tmp_path):
    shared = tmp_path / "shared"
    prepare("manifest", shared, reencode=FORM, workers=2, **options(clips))
    one, two = (files(folder / "mine/1.0.0") for folder in (data_dir, shared))
    assert len(one) == 2 and [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    source = SourceConfig("mine")
    assert fingerprint(source, data_dir) == fingerprint(source, shared)


def test_a_damaged_picture_costs_its_clip_alone(data_dir, capfd):
    rows._reported.clear()
    path = files(data_dir / "mine/1.0.0")[0]
    with path.open("r+b") as file:
        count = path.stat().st_size // 4  # pictures of the last clip alone
        file.seek(-count, os.SEEK_END)
        file.write(b"x" * count)
    batches = take(config(data_dir), 12)
    valid = np.concatenate([batch.valid for batch in batches])
    assert NUM_CLIPS < valid.sum() < valid.size
    assert all((batch.video[~batch.valid] == 0).all() for batch in batches)
    found = capfd.readouterr().err
    assert found.count("cannot be used: damaged record: picture ") == 1


def test_a_missing_file_of_pictures_is_named(data_dir):
    path = files(data_dir / "mine/1.0.0")[1]
    path.unlink()
    with pytest.raises(MissingError, match=rf"{path}: no such file"):
        open_source(SourceConfig("mine"), data_dir)


def test_a_part_is_added(data_dir, clips):
    more = {"name": "mine", "splits": {"train": clips / "more.jsonl"}}
    with pytest.raises(UserError, match="in another form: add them with its --store, "):
        prepare("manifest", data_dir, add=True, reencode=Reencode(fps=8), **more)
    new = prepare("manifest", data_dir, add=True, reencode=FORM, **more)
    assert len(files(new)) == 3 and read_form(new) == FORM
    assert os.path.samefile(files(new)[0], files(data_dir / "mine/1.0.0")[0])
    records = open_source(SourceConfig("mine"), data_dir)
    shown = [records[i]["media"].frames([0.0])[0].shape for i in range(len(records))]
    assert shown == [(32, 64, 3)] * (NUM_CLIPS + 2)


def test_the_pictures_lie_beside_the_records(data_dir):
    folder = data_dir / "mine/1.0.0"
    shards = sorted(folder.glob("*array_record*-of-00002"))
    assert files(folder) == [pictures_path(path) for path in shards]
    assert all(path.stat().st_size > 1000 for path in files(folder))


def test_the_form_is_said_and_another_one_refused(data_dir, clips):
    with pytest.raises(
        UserError, match=r"JPEG pictures of quality 90.*, not .* a key frame every 8"
    ):
        prepare("manifest", data_dir, reencode=Reencode(fps=8), **options(clips))


def test_command_line(capsys):
    _, found = parse_args(["shapes", "--store=frames", "--fps=4", "--quality=80"])
    assert found["reencode"] == Reencode(fps=4, store="frames", quality=80)
    for flags, message in (
        (["--store=frames", "--key-frames=4"], "--key-frames belongs to --store video"),
        (["--quality=80"], "--quality belongs to --store frames"),
        (["--store=frames", "--quality=0"], "quality must be 1 to 100"),
    ):
        with pytest.raises(SystemExit):
            parse_args(["shapes", *flags])
        assert message in capsys.readouterr().err


def test_a_file_is_open_while_it_is_read(tmp_path, monkeypatch):
    """Also that of a thread whose copy is not kept, because another one opened the file too."""
    path = tmp_path / "a.pictures"
    path.write_bytes(b"abcdef")
    monkeypatch.setattr(pictures, "_files", lambda: lambda path: open(path, "rb", buffering=0))
    assert pictures._read(str(path), 2, 3) == b"cde"
