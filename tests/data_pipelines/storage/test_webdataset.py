"""Tar files as img2dataset and video2dataset write them, with media and texts of our own."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.media import decode
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Question
from data_pipelines.storage.builders.named import expand
from data_pipelines.storage.builders.webdataset import read_tar
from data_pipelines.storage.prepare import parse_args, prepare
from data_pipelines.storage.tasks import Skipped


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, dict):
                content = json.dumps(content)
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def still(color, size=(16, 12), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


@pytest.fixture
def read_tars(read_train):
    def read(pattern="{00000..00001}.tar", **options):
        return read_train("webdataset", pattern, **options)

    return read


def test_images_and_clips_with_their_texts(tmp_path, small_media, read_tars):
    image, clip = small_media[".jpg"], small_media[".mp4"]
    first = {"000000012.jpg": image, "000000012.txt": "a dog \n"}
    first["000000012.json"] = {"caption": "not read"}
    second = {"000000013.json": {"caption": "a cat", "status": "success"}, "000000013.jpg": image}
    write_tar(tmp_path / "00000.tar", first | second)
    asked = {"question": "what?", "answer": "a cat"}
    more = {"000000012.mp4": clip, "000000012.txt": "é", "a/b.0.mp4": clip, "b_1.json": asked}
    write_tar(tmp_path / "00001.tar", more | {"b_1.mp4": clip, "b_2.txt": "two", "b_2.mp4": clip})
    examples = {item.match_id: item for item in read_tars(max_bad_ratio=0.2)}
    assert {key: item.captions for key, item in examples.items()} == {
        "00000/000000012": ["a dog"],
        "00000/000000013": ["a cat"],
        "00001/000000012": ["é"],
        "00001/b_1": [],
        "00001/b_2": ["two"],
    }
    assert examples["00001/b_1"].questions == [Question("what?", "a cat", "")]
    assert examples["00000/000000013"].media == image
    assert examples["00000/000000013"].media_type == "image"
    assert examples["00001/b_2"].media == clip and examples["00001/b_2"].media_type == "video"
    assert examples["00001/b_2"].source == f"{tmp_path}/00001.tar:b_2"


def test_captions_of_the_parquet_file_beside_a_tar(tmp_path, small_media, read_tars):
    image = small_media[".jpg"]
    write_tar(tmp_path / "00000.tar", {"000.jpg": image, "001.jpg": image, "002.jpg": image})
    table = {"key": ["000", "001", "002"], "caption": ["a dog", "a cat", None], "url": ["x"] * 3}
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    examples = read_tars("*.tar", max_bad_ratio=0.4)
    assert [item.captions for item in examples] == [["a dog"], ["a cat"]]


def test_numbered_stills_of_one_text_are_a_clip(tmp_path, read_tars):
    colors = ("red", "lime", "blue")
    stills = {f"c_{i:03d}.png": still(color, (17, 12 + i)) for i, color in enumerate(colors)}
    members = {"c.txt": "three colors", **stills}
    members |= {
        "e_9.txt": "alone",
        "e_9.png": still("red"),
        "d.txt": "one",
        "d_000.png": still("red"),
    }
    write_tar(tmp_path / "00000.tar", members)
    alone, single, clip = sorted(read_tars("00000.tar"), key=lambda item: item.captions)
    assert clip.captions == ["three colors"] and clip.media_type == "video"
    assert decode.probe(clip.media).duration_secs == 3
    frames = decode.decode_frames(clip.media, [0.5, 1.5, 2.5])
    assert frames.shape == (3, 12, 16, 3)
    assert np.argmax(frames.mean(axis=(1, 2)), axis=1).tolist() == [0, 1, 2]
    assert (alone.captions, alone.media_type) == (["alone"], "image")
    assert (single.captions, single.media_type) == (["one"], "image")


@pytest.mark.e2e
def test_the_order_of_the_tars_is_kept_by_any_number_of_workers(tmp_path, small_media):
    for shard in range(2):
        members = {}
        for i in range(4):
            members |= {f"{i}.jpg": small_media[".jpg"], f"{i}.txt": f"{shard} {i}"}
        write_tar(tmp_path / f"0{shard}.tar", members)
    options = {"name": "mine", "splits": {"train": str(tmp_path / "{00..01}.tar")}, "num_shards": 2}
    one, two = (prepare("webdataset", tmp_path / f"data{n}", workers=n, **options) for n in (1, 2))
    lines = (one / "texts_train.jsonl").read_text().splitlines()
    said = [json.loads(line)["captions"] for line in lines]
    assert said == [[f"{shard} {i}"] for shard in range(2) for i in range(4)]
    for path in one.glob("*array_record*"):
        assert path.read_bytes() == (two / path.name).read_bytes()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"1.jpg": b"x"}, "without a caption"),
        ({"1.txt": "a dog"}, "without a media member"),
        ({"1.txt": b"\xff", "1.jpg": b"x"}, "with unreadable texts"),
        ({"1.json": "{", "1.jpg": b"x"}, "with unreadable texts"),
        ({"1.json": {"url": "a"}, "1.jpg": b"x"}, "with unreadable texts"),
    ],
)
def test_samples_that_cannot_be_used_are_skipped(tmp_path, members, reason):
    [item] = read_tar(write_tar(tmp_path / "a.tar", members))
    assert isinstance(item, Skipped) and item.reason == reason
    assert item.source == f"{tmp_path}/a.tar:1"


def test_unreadable_frames_are_skipped(tmp_path, read_tars, small_media):
    members = {"a.txt": "a", "a_0.jpg": b"x", "a_1.jpg": b"y", "b.txt": "b"}
    write_tar(tmp_path / "00000.tar", members | {"b.jpg": small_media[".jpg"]})
    with pytest.raises(UserError, match="1 with unreadable frames"):
        read_tars("00000.tar")


def test_a_tar_that_is_cut_short_loses_its_end_only(tmp_path, small_media):
    members = {}
    for i in range(3):
        members |= {f"{i}.txt": "a dog", f"{i}.jpg": small_media[".jpg"]}
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path) as tar:
        place = tar.getmember("2.txt").offset_data
    path.write_bytes(path.read_bytes()[: place + 2])
    *whole, cut = read_tar(path)
    assert cut.reason == "after the end of a tar file that is cut short"
    assert [item.match_id for item in whole][:2] == ["a/0", "a/1"]


def test_packed_and_missing_tars_are_named(tmp_path, read_tars):
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"a.tar: not an uncompressed tar file"):
        read_tars("a.tar")
    write_tar(tmp_path / "b.tar", {})
    with pytest.raises(UserError, match=r"a.tar: not an uncompressed tar file"):
        read_tars("*.tar", workers=2)
    with pytest.raises(FileNotFoundError, match=r"00000.tar: no such file \(and 1 others\)"):
        read_tars()
    with pytest.raises(FileNotFoundError, match=r"\*.tgz: no such file"):
        read_tars("*.tgz")


def test_patterns_and_the_command_line(tmp_path):
    assert expand("{0..1}/{09..10}.tar") == ["0/09.tar", "0/10.tar", "1/09.tar", "1/10.tar"]
    assert expand("a/b.tar") == ["a/b.tar"] and expand(f"{tmp_path}/*.tar") == []
    name, options = parse_args(["webdataset", "--name=a", "--split=train=x/{00..12}.tar"])
    assert name == "webdataset" and options["splits"] == {"train": "x/{00..12}.tar"}
    assert options["fields"] == {} and "manual_dir" not in options
