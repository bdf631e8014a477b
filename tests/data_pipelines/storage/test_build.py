"""Preparation by several processes and machines, in several attempts, and of parts added later."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from batches import Stills
from PIL import Image
from tensorflow_datasets.core import hashing

from data_pipelines.media.reencode import Reencode
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.records import Example
from data_pipelines.storage import finish, shards
from data_pipelines.storage.build import build
from data_pipelines.storage.builders.manifest import Manifest
from data_pipelines.storage.prepare import parse_args, prepare
from data_pipelines.storage.shared_media import describe_shared
from data_pipelines.storage.stored import open_source, read_info, read_texts
from data_pipelines.storage.tasks import Skipped, shuffled_order

NUM_IMAGES = 60


@pytest.fixture
def manifest(tmp_path):
    """Writes images and a manifest of them."""

    def write(name="train.jsonl", numbers=range(NUM_IMAGES)):
        lines = []
        for number in numbers:
            pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
            line = {"media": f"{number}.png", "caption": f"image {number}", "id": str(number)}
            lines.append(json.dumps(line) + "\n")
        (tmp_path / name).write_text("".join(lines))
        return tmp_path / name

    return write


def contents(folder):
    """The bytes of every file, but for what tells one data_dir from another."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "parts.json"}


def ids(folder, split="train"):
    records = open_source(SourceConfig(folder.parent.name, split), folder.parent.parent)
    return [int(record["match_id"]) for record in records]


def options(manifest, **more):
    return {"name": "mine", "splits": {"train": manifest}, "num_shards": 5, **more}


def test_the_order_is_that_of_tfds(tmp_path, manifest):
    """So a data set prepared anew gives the batches that it gave before."""
    hash_key = hashing.Hasher("train").hash_key
    order = shuffled_order("train", 30).tolist()
    assert order == sorted(range(30), key=lambda number: hash_key(f"{number:09d}"))
    path = manifest(numbers=range(30))
    folder = prepare("manifest", tmp_path / "data", name="mine", splits={"train": path})
    assert ids(folder) == order


def test_workers_and_machines_store_the_same_bytes(tmp_path, manifest):
    path = manifest()
    alone = prepare("manifest", tmp_path / "alone", **options(path))
    assert len(list(alone.glob("mine-train.array_record*-of-00005"))) == 5
    several = prepare("manifest", tmp_path / "several", workers=2, **options(path))
    assert contents(several) == contents(alone)
    for index in (2, 0):  # of three machines; one never comes
        unfinished = prepare("manifest", tmp_path / "array", part=(index, 3), **options(path))
        assert unfinished.name == "incomplete.1.0.0"
    assert len(list((unfinished / "work").glob("done_*"))) == 3
    assert contents(prepare("manifest", tmp_path / "array", **options(path))) == contents(alone)


def test_machines_work_at_the_same_time(tmp_path, manifest, monkeypatch):
    """While one writes a shard, another plans nothing anew and writes all of its own."""
    path, write = manifest(), shards.write_shard

    def write_both(builder, space, shard):
        monkeypatch.setattr(shards, "write_shard", write)
        prepare("manifest", tmp_path, part=(1, 2), **options(path))
        return write(builder, space, shard)

    monkeypatch.setattr(shards, "write_shard", write_both)
    unfinished = prepare("manifest", tmp_path, part=(0, 2), **options(path))
    assert len(list((unfinished / "work").glob("done_*"))) == 5


def test_more_shards_change_the_files_but_not_the_order(tmp_path, manifest):
    path = manifest()
    one = prepare("manifest", tmp_path / "one", **options(path, num_shards=1))
    five = prepare("manifest", tmp_path / "five", **options(path))
    assert ids(one) == ids(five)
    assert (one / "texts_train.jsonl").read_bytes() == (five / "texts_train.jsonl").read_bytes()
    assert prepare("manifest", tmp_path / "many", **options(path, num_shards=999))


def test_shards_follow_from_size(tmp_path, manifest, monkeypatch):
    monkeypatch.setattr(shards, "MAX_RECORDS", 25)
    folder = prepare("manifest", tmp_path, **options(manifest(), num_shards=None))
    assert read_info(folder).splits["train"].shard_lengths == [20, 20, 20]
    size = (tmp_path / "0.png").stat().st_size
    monkeypatch.setattr(shards, "MAX_BYTES", 10 * size)
    assert shards.num_shards(NUM_IMAGES, NUM_IMAGES * size) == 6


def test_killed_at_random_it_goes_on_to_the_same_bytes(tmp_path, manifest):
    """Whatever is killed, with its workers or alone, the same command ends with the same files."""
    path = manifest(numbers=range(4 * NUM_IMAGES))  # more than are stored before the last kill
    whole = prepare("manifest", tmp_path / "whole", **options(path, num_shards=80))
    command = [sys.executable, "-m", "data_pipelines.storage.prepare", "manifest", "--name=mine"]
    command += [f"--split=train={path}", f"--data-dir={tmp_path / 'killed'}", "--num-shards=80"]
    rng, work = random.Random(0), tmp_path / "killed" / "mine" / "incomplete.1.0.0" / "work"
    finished = []
    for workers in (1, 2, 2):
        process = subprocess.Popen([*command, f"--workers={workers}"], stderr=subprocess.DEVNULL)
        count = len(list(work.glob("done_*")))
        while len(list(work.glob("done_*"))) == count and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished.append(len(list(work.glob("done_*"))))
    assert finished == sorted(finished) and 0 < finished[0]
    stamps = {mark.name: mark.stat().st_mtime_ns for mark in work.glob("done_*")}
    subprocess.run(command, check=True)
    folder = tmp_path / "killed" / "mine" / "1.0.0"
    assert contents(folder) == contents(whole)
    assert stamps or folder.is_dir()


def test_what_is_finished_is_not_written_again(tmp_path, manifest, monkeypatch):
    path, write, calls = manifest(), shards.write_shard, []

    def interrupted(builder, space, shard):
        if calls == [0, 1, 2]:
            raise KeyboardInterrupt
        calls.append(shard.index)
        return write(builder, space, shard)

    monkeypatch.setattr(shards, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("manifest", tmp_path, **options(path))
    calls.insert(0, "interrupted")
    prepare("manifest", tmp_path, **options(path))
    assert calls == ["interrupted", 0, 1, 2, 3, 4]


def test_another_request_does_not_go_on(tmp_path, manifest):
    path = manifest()
    prepare("manifest", tmp_path, part=(0, 2), **options(path))
    with pytest.raises(UserError, match=r"incomplete.1.0.0 was begun with num_shards=5, not 4"):
        prepare("manifest", tmp_path, **options(path, num_shards=4))
    with path.open("a") as file:
        file.write(json.dumps({"media": "0.png", "caption": "once more"}) + "\n")
    with pytest.raises(UserError, match="annotation files have changed since"):
        prepare("manifest", tmp_path, **options(path))


def test_killed_while_finishing(tmp_path, manifest, monkeypatch):
    path = manifest()
    whole = prepare("manifest", tmp_path / "whole", **options(path))

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "_write_info", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare("manifest", tmp_path / "data", **options(path))
    assert contents(prepare("manifest", tmp_path / "data", **options(path))) == contents(whole)


def test_a_part_is_added_and_the_old_records_stay(tmp_path, manifest):
    data_dir = tmp_path / "data"
    old = prepare("manifest", data_dir, **options(manifest()))
    before, vocabulary = ids(old), (old / "vocab.txt").read_bytes()
    more = options(manifest("more.jsonl", range(NUM_IMAGES, NUM_IMAGES + 10)), num_shards=1)
    new = prepare("manifest", data_dir, add=True, **more)
    assert new.name == "1.0.1" and ids(new)[:NUM_IMAGES] == before
    assert sorted(ids(new)) == list(range(NUM_IMAGES + 10))
    assert (new / "vocab.txt").read_bytes() == vocabulary
    texts = read_texts(SourceConfig("mine"), data_dir)
    assert [int(text.match_id) for text in texts] == ids(new)
    first = "mine-train.array_record-00000-of-0000"
    assert os.path.samefile(old / f"{first}5", new / f"{first}6")  # nothing is stored twice
    with pytest.raises(UserError, match=r"1\.0\.1 holds this part already"):
        prepare("manifest", data_dir, add=True, **more)
    with pytest.raises(UserError, match="holds media in another form"):
        prepare("manifest", data_dir, add=True, reencode=Reencode(short_side=16), **more)
    test = {"test": manifest("test.jsonl", range(3))}
    newest = prepare("manifest", data_dir, add=True, name="mine", splits=test)
    assert len(ids(newest)) == NUM_IMAGES + 10 and len(ids(newest, "test")) == 3
    assert prepare("manifest", data_dir, **options(tmp_path / "train.jsonl")) == newest
    with pytest.raises(UserError, match=r"nothing is prepared in .* to add to"):
        prepare("manifest", tmp_path / "none", add=True, **more)


def test_bad_media_stop_a_long_preparation_early(tmp_path, manifest):
    path = manifest()
    for number in range(0, NUM_IMAGES, 2):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"of 60 examples cannot be used .* not a readable image"):
        prepare("manifest", tmp_path, max_bad_ratio=0.1, **options(path))
    unfinished = tmp_path / "mine" / "incomplete.1.0.0"
    assert len(list((unfinished / "work").glob("done_*"))) == 1
    lines = (unfinished / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in lines} == {"not a readable image"}


def test_shards_without_a_usable_record_are_dropped(tmp_path, manifest):
    path = manifest()
    for number in shuffled_order("train", NUM_IMAGES)[:12]:
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    folder = prepare("manifest", tmp_path, max_bad_ratio=0.5, **options(path))
    assert len(ids(folder)) == 48
    assert len(list(folder.glob("*-of-00004"))) == 4


class Large(Stills):
    """Images that are each a megabyte, made while they are asked for."""

    def examples(self):
        return {"train": (self._still(i) for i in range(120))}

    def _still(self, number):
        pixels = np.random.default_rng(number).integers(0, 255, (600, 600, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        return Example(file.getvalue(), "image", ["noise"], str(number), str(number))


SCRIPT = """
import resource, sys
sys.path[:0] = {paths!r}
from test_build import Large
from data_pipelines.storage.build import build
build(Large(data_dir={data_dir!r}), num_shards=12)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_stays_far_below_the_data(tmp_path):
    """120 images of 1.1 MB: TFDS held all of them, and above 1,000 MiB needed TensorFlow."""
    idle = "import data_pipelines.storage.build, resource, test_build\n"
    idle += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    paths = [os.path.dirname(__file__), *sys.path]
    script = SCRIPT.format(paths=paths, data_dir=str(tmp_path))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    needed, used = (
        int(
            subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, check=True
            ).stdout
        )
        for code in (idle, script)
    )
    stored = sum(path.stat().st_size for path in tmp_path.glob("large/1.0.0/*"))
    assert stored > 120e6 and used - needed < 60  # MiB


def test_repeated_annotations_are_found_without_keeping_them(tmp_path, manifest):
    class Repeating(Manifest):
        drop_repeats = True

    path = manifest(numbers=range(3))
    path.write_text(path.read_text() * 2)
    folder = build(Repeating(name="mine", splits={"train": path}, data_dir=tmp_path))
    assert sorted(ids(folder)) == [0, 1, 2]
    [*skipped] = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    assert [item["source"] for item in skipped] == [f"{path}:{n}" for n in (4, 5, 6)]
    assert Skipped(**skipped[0]).reason == "repeated annotations"


def test_command_line():
    words = ["manifest", "--name=x", "--split=train=t"]
    _, options = parse_args([*words, "--workers=4", "--num-shards=9", "--shards=2/3", "--add"])
    assert options["workers"] == 4 and options["num_shards"] == 9 and options["add"]
    assert options["part"] == (2, 3)
    for wrong in ("--shards=3/3", "--shards=1", "--workers=0", "--num-shards=x"):
        with pytest.raises(SystemExit):
            parse_args([*words, wrong])


def test_media_of_two_splits_are_counted_when_prepared_and_said_when_evaluated(
    tmp_path, manifest, capsys
):
    """After a part is added, too; slices of a split are of that split."""
    splits = {
        "train": manifest("train.jsonl", range(30)),
        "val": manifest("val.jsonl", range(28, 38)),
        "test": manifest("test.jsonl", range(38, 42)),
    }
    prepare("manifest", tmp_path / "data", name="mine", splits=splits)
    assert "mine: 2 of the 10 media of val are in train too" in capsys.readouterr().err

    def said(train: str, evaluated: str) -> list[str]:
        sources = (SourceConfig("other"), SourceConfig("mine", train))
        data = DataConfig(sources, SourceConfig("mine", evaluated), str(tmp_path / "data"))
        return describe_shared(data)

    [sentence] = said("train[:50%]+test", "val[:4]")
    assert sentence.startswith("mine: 2 media of val are in train too")
    assert said("train", "test") == said("test", "val") == []
    more = {"train": manifest("more.jsonl", [40])}
    prepare("manifest", tmp_path / "data", name="mine", splits=more, add=True)
    assert "1 of the 4 media of test are in train too" in capsys.readouterr().err
    assert len(said("train", "test+val")) == 2
