"""Prepared folders as they are read: few open files, texts without media, folders of old."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from batches import assert_equal, take

from data_pipelines.loading.evaluation import eval_data
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.config import SourceConfig
from data_pipelines.storage import open_files, records, stored
from data_pipelines.storage.build import build
from data_pipelines.storage.builders.shapes import Shapes
from data_pipelines.storage.class_counts import classes_for
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.stored import fingerprint, open_source, read_texts


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """A data_dir with `shapes` in 24 shards."""
    data_dir = tmp_path_factory.mktemp("many")
    sizes = {"num_train": 24, "num_val": 4, "num_test": 10, "frame_size": 32}
    build(Shapes(data_dir=data_dir, **sizes), num_shards=24)
    return data_dir


@pytest.fixture
def old_dir(shapes_dir, tmp_path):
    """The data set as older versions left it: nothing beside the records."""
    folder = tmp_path / "old" / "shapes" / "1.1.0"
    shutil.copytree(shapes_dir / "shapes" / "1.1.0", folder)
    for pattern in ("texts_*", "shards.json", "parts.json"):
        for file in folder.glob(pattern):
            file.unlink()
    return tmp_path / "old"


def test_tfds_reads_the_records(shapes_dir):
    source = tfds.builder_from_directory(shapes_dir / "shapes" / "1.1.0").as_data_source("train")
    ours = open_source(SourceConfig(), shapes_dir)
    assert len(source) == len(ours) == 24
    for theirs, record in zip((source[i] for i in range(24)), ours, strict=True):
        assert set(theirs) == set(record) and theirs["media"] == record["media"]
        assert list(theirs["captions"]) == record["captions"]
        assert {k: list(v) for k, v in theirs["questions"].items()} == record["questions"]


def test_records_from_before_questions_had_options(shapes_dir):
    record = open_source(SourceConfig(), shapes_dir)[0]
    example = records.tf_example_pb2.Example.FromString(
        stored._readers()(str(next((shapes_dir / "shapes/1.1.0").glob("*train.arr*")))).read([0])[0]
    )
    del example.features.feature["questions/options"]
    assert records.unpack(example.SerializeToString()) == record


@pytest.mark.parametrize("split", ["train", "train[25%:75%]", "test+val", "train[20:]+test[:3]"])
def test_texts_are_those_of_the_records(many_shards, split):
    source = SourceConfig("shapes", split)
    texts = read_texts(source, many_shards)
    expected = [records.texts_of(record) for record in open_source(source, many_shards)]
    assert list(texts) == expected and texts[len(texts) - 1] == expected[-1]
    with pytest.raises(IndexError):
        texts[len(texts)]


def test_texts_and_classes_touch_no_media(shapes_dir, shapes_config, monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(stored, "_readers", lambda: refuse)
    config = dataclasses.replace(shapes_config, task="questions")
    assert classes_for(config).counts and eval_data(config).num_clips == 10
    assert len(read_texts(SourceConfig(), shapes_dir)[3].captions) == 3


def test_wrong_captions_touch_no_media(shapes_config, monkeypatch):
    """A batch reads as many records as it has rows, however many captions come with each."""
    opened, unpack = [], stored.unpack
    monkeypatch.setattr(stored, "unpack", lambda record: opened.append(1) or unpack(record))
    config = dataclasses.replace(shapes_config, num_others=3)
    take(config, 6)
    with_others = len(opened)
    opened.clear()
    take(dataclasses.replace(config, num_others=0), 6)
    # Batches are read ahead, by at most four and one a thread.
    assert with_others <= 1 + 4 * (6 + 4 + 8) and opened


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_that_may_only_be_read(shapes_dir, shapes_config, num_workers, tmp_path):
    """Nothing writes into a prepared folder, neither for texts nor for anything else."""
    folder = tmp_path / "data" / "shapes" / "1.1.0"
    shutil.copytree(shapes_dir / "shapes" / "1.1.0", folder)
    before = {path.name: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    config = dataclasses.replace(
        shapes_config, data_dir=str(tmp_path / "data"), num_others=2, num_workers=num_workers
    )
    assert_equal(take(config, 2), take(dataclasses.replace(config, data_dir=str(shapes_dir)), 2))
    eval_data(config)
    assert prepare("shapes", tmp_path / "data") == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == ["1.1.0"]  # not even a lock
    assert {path.name: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before


def test_old_folders_are_read_and_completed(old_dir, shapes_dir, shapes_config):
    source = SourceConfig("shapes", "train[:50%]")
    expected = list(read_texts(source, shapes_dir))
    assert read_texts(source, old_dir) == expected  # past the media
    config = dataclasses.replace(shapes_config, num_others=2)
    assert_equal(take(dataclasses.replace(config, data_dir=str(old_dir)), 2), take(config, 2))
    folder = prepare("shapes", old_dir)
    assert list(read_texts(source, old_dir)) == expected
    for name in ("texts_train.jsonl", "texts_train.npy"):
        assert (folder / name).read_bytes() == (shapes_dir / "shapes/1.1.0" / name).read_bytes()


def test_few_readers_are_kept(many_shards, monkeypatch):
    """Any order of records of 24 shards, with four of them open at a time."""
    monkeypatch.setattr(open_files, "MAX_READERS", 4)
    stored._readers.cache_clear()
    source = open_source(SourceConfig(), many_shards)
    before, most, order = num_open(), 0, np.random.default_rng(0).permutation(24 * 3) % 24
    sources = [source[int(i)]["source"] for i in order[:24]]
    for index in order:
        source[int(index)]
        most = max(most, num_open() - before)
    stored._readers.cache_clear()
    assert most <= 4 and len(set(sources)) == len(set(order[:24].tolist()))


def num_open():
    return len(os.listdir("/proc/self/fd"))


SCRIPT = """
import sys, dataclasses
from data_pipelines.loading.pipeline import train_batches
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.storage.open_files import check_open_files
if __name__ == "__main__":
    config = DataConfig(data_dir={data_dir!r}, image_size=32, batch_size=4, num_workers=2,
        train=(SourceConfig("shapes"), SourceConfig("shapes", "test+val")), eval=SourceConfig())
    check_open_files(2)
    with train_batches(config, 0, seed=0) as batches:
        print(sum(int(next(batches).valid.sum()) for _ in range(20)))
"""


def test_training_with_a_low_limit_of_open_files(many_shards, tmp_path):
    """38 shards in two workers; the soft limit is raised to a hard one that they need."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(data_dir=str(many_shards)))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run(soft, hard):
        command = f"ulimit -Sn {soft}; ulimit -Hn {hard}; exec {sys.executable} {script}"
        return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)

    assert run(60, 260).stdout.strip() == "80"
    refused = run(60, 200)
    assert "the limit of open files is 200, but training with data.num_workers=2" in refused.stderr
    assert refused.returncode == 1


def test_the_limit_is_raised_in_this_process_and_in_workers():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        assert open_files.raise_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
        assert open_files.max_readers() == min(open_files.MAX_READERS, hard // 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_fingerprints_follow_the_records(many_shards, shapes_dir, old_dir, tmp_path):
    train = SourceConfig()
    known = fingerprint(train, shapes_dir)
    shutil.copytree(shapes_dir / "shapes", tmp_path / "copy" / "shapes")
    assert fingerprint(train, tmp_path / "copy") == known
    assert fingerprint(SourceConfig(split="train[:50%]"), shapes_dir) != known
    assert fingerprint(train, many_shards) != known  # other shards may mean another order
    assert fingerprint(train, old_dir) == fingerprint(train, old_dir) != known
    build(Shapes(data_dir=tmp_path, num_train=24, num_val=4, num_test=10, frame_size=32, seed=1))
    assert fingerprint(train, tmp_path) != known
    digests = json.loads((shapes_dir / "shapes/1.1.0/shards.json").read_text())
    assert len(digests) == 3 and all(len(digest) == 32 for digest in digests.values())


def test_records_travel_to_workers_as_paths(many_shards):
    texts = read_texts(SourceConfig(), many_shards)
    assert texts[0]
    dataset = grain.MapDataset.source(open_source(SourceConfig(), many_shards))
    with pytest.raises(UserError):
        open_source(SourceConfig(split="none"), many_shards)
    import cloudpickle

    again = cloudpickle.loads(cloudpickle.dumps((texts, dataset)))
    assert again[0][5] == texts[5] and again[1][5] == dataset[5]
    assert len(cloudpickle.dumps(texts)) < 2000


@pytest.mark.parametrize(
    "spelled", [{"pythonClassName": "strange.code.Text"}, {"python_class_name": "a.Text"}]
)
def test_a_class_that_we_do_not_write_is_not_imported(old_dir, spelled, tmp_path, monkeypatch):
    """TFDS imports the module of each class that `features.json` names."""
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "code.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = old_dir / "shapes" / "1.1.0" / "features.json"
    values = json.loads(path.read_text())
    values["featuresDict"]["features"]["media"] |= spelled
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"features\.json names '(strange\.code|a)\.Text', which"):
        open_source(SourceConfig(), old_dir)
