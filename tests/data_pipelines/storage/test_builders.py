"""The base builder, manifests and `prepare`: good and bad input."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.records import Example, Question
from data_pipelines.storage import prepare as prepare_module
from data_pipelines.storage.build import build
from data_pipelines.storage.builders import base
from data_pipelines.storage.builders.manifest import Manifest
from data_pipelines.storage.prepare import parse_args, prepare
from data_pipelines.storage.records import questions_of
from data_pipelines.storage.stored import open_source, source_states
from data_pipelines.storage.tasks import Skipped


@pytest.fixture(scope="module")
def clip(write_clip):
    return write_clip(range(0, 1000, 100))


@pytest.fixture(scope="module")
def image():
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, format="PNG")
    return file.getvalue()


class Listed(base.VideoTextBuilder):
    """Yields the examples it is given."""

    def __init__(self, *, splits, **kwargs):
        super().__init__(**kwargs)
        self.splits = splits

    def examples(self):
        return {name: iter(items) for name, items in self.splits.items()}


def example(media, number=0, **changes):
    fields = {"media_type": "video", "captions": ["a dog"], "match_id": str(number)}
    return Example(**{"media": media, "source": f"file{number}", **fields, **changes})


def write_manifest(folder, lines, name="train.jsonl"):
    path = folder / name
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def records_of(folder, split):
    return list(open_source(SourceConfig(folder.parent.name, split), folder.parent.parent))


def test_stored_examples_read_back(tmp_path, clip, image):
    question = Question("what runs?", "a dog", "what", ("a cat", "a dog"))
    good = example(clip, 1, captions=["a dog", "Ein Hünd"], questions=[question], labels=["dog"])
    still = example(image, 2, media_type="image")
    builder = Listed(data_dir=tmp_path, splits={"train": [good, still], "test": [good]})
    folder = build(builder)
    records = {record["match_id"]: record for record in records_of(folder, "train")}
    assert set(records) == {b"1", b"2"}
    record = records[b"1"]
    assert record["media"] == clip and record["media_type"] == b"video"
    assert [text.decode() for text in record["captions"]] == ["a dog", "Ein Hünd"]
    assert list(record["labels"]) == [b"dog"] and record["source"] == b"file1"
    assert questions_of(record) == [question]
    assert records[b"2"]["media"] == image and len(records[b"2"]["labels"]) == 0
    assert (folder / "skipped.jsonl").read_text() == ""
    assert "tensorflow" not in sys.modules


def test_questions_alone_make_an_example(tmp_path, clip):
    question = Question("what runs?", "a dog", "what")
    item = example(clip, captions=[], questions=[question])
    builder = Listed(data_dir=tmp_path, splits={"train": [item]})
    folder = build(builder)
    [record] = records_of(folder, "train")
    assert len(record["captions"]) == 0 and questions_of(record) == [question]


def test_parts_are_reported_but_not_counted_as_examples(tmp_path, clip, capfd):
    part = Skipped("file0", "empty captions", whole=False)
    builder = Listed(data_dir=tmp_path, splits={"train": [part, part, example(clip)]})
    folder = build(builder)
    listed = tmp_path / "listed" / "1.0.0" / "skipped.jsonl"
    assert f"listed: left out 2 empty captions, see {listed}" in capfd.readouterr().err
    assert len((folder / "skipped.jsonl").read_text().splitlines()) == 2


def test_vocabulary_comes_from_the_training_texts(tmp_path, clip):
    question = Question("what barks?", "puppy", "what")
    train = example(clip, captions=["a zebra runs"], questions=[question])
    splits = {"train": [train], "test": [example(clip, captions=["giraffe"])]}
    builder = Listed(data_dir=tmp_path, splits=splits)
    folder = build(builder)
    words = (folder / "vocab.txt").read_text().splitlines()
    assert words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert {"zebra", "runs", "barks", "puppy"} <= set(words) and "giraffe" not in words


def test_without_a_training_split_all_texts_count(tmp_path, clip):
    builder = Listed(data_dir=tmp_path, splits={"test": [example(clip, captions=["giraffe"])]})
    folder = build(builder)
    assert "giraffe" in (folder / "vocab.txt").read_text().splitlines()


def bad_examples(clip, image):
    return {
        "without a text": example(clip, captions=[]),
        "with an empty caption": example(clip, captions=["a dog", "  "]),
        "not a readable video": example(clip[: len(clip) // 2]),
        "an image where a video is expected": example(image),
        "a video where an image is expected": example(clip, media_type="image"),
        "not a readable image": example(image[:40], media_type="image"),
        "without a file": Skipped("file0", "without a file"),
    }


@pytest.mark.parametrize("reason", list(bad_examples(b"", b"")))
def test_bad_examples_are_skipped_and_reported(tmp_path, clip, image, reason, capfd):
    bad = bad_examples(clip, image)[reason]
    splits = {"train": [bad, *(example(clip, i) for i in range(1, 4))]}
    builder = Listed(data_dir=tmp_path, splits=splits, max_bad_ratio=0.25)
    folder = build(builder)
    assert len(records_of(folder, "train")) == 3
    [line] = (folder / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == reason and json.loads(line)["source"] == "file0"
    message = rf"listed: 1 of 4 examples cannot be used \(1 {reason}; first: file0.*\); skipped"
    assert re.search(message, capfd.readouterr().err)


def test_too_many_bad_examples_stop_and_leave_nothing(tmp_path, clip, image):
    bad = [example(image, i) for i in range(2)] + [example(clip, 2, captions=[""])]
    splits = {"train": [*bad, *(example(clip, i) for i in range(3, 9))]}
    builder = Listed(data_dir=tmp_path, splits=splits, max_bad_ratio=0.3)
    with pytest.raises(ValueError) as error:
        build(builder)
    listed = tmp_path / "listed" / "incomplete.1.0.0" / "skipped.jsonl"
    assert str(error.value).startswith(
        "listed: 3 of 9 examples cannot be used (2 an image where a video is expected, "
        "1 with an empty caption; first: file"
    )
    assert str(error.value).endswith(f"more than --max-bad-ratio 0.3 allows; see {listed}")
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(line["source"] for line in lines) == ["file0", "file1", "file2"]
    with pytest.raises(MissingError):
        open_source(SourceConfig("listed"), tmp_path)
    generous = Listed(data_dir=tmp_path, splits=splits, max_bad_ratio=0.5)
    assert len(records_of(build(generous), "train")) == 6  # goes on with the shard that is there


def test_a_split_without_usable_examples_stops(tmp_path, clip, image):
    splits = {"train": [example(clip)], "test": [example(image)]}
    builder = Listed(data_dir=tmp_path, splits=splits, max_bad_ratio=1)
    with pytest.raises(ValueError, match=r"split 'test' has no usable example \(1 an image"):
        build(builder)


def test_manifest_reads_every_field(tmp_path, clip, image):
    (tmp_path / "clip.mp4").write_bytes(clip)
    (tmp_path / "still.png").write_bytes(image)
    questions = [{"question": "what?", "answer": "a dog", "options": ["a dog", "a cat"]}]
    lines = [
        {"media": "clip.mp4", "captions": ["a dog", "dog"], "id": "x", "questions": questions},
        "",
        {"media": str(tmp_path / "still.png"), "caption": "red", "labels": ["color"]},
    ]
    manifest = write_manifest(tmp_path, lines)
    folder = prepare(
        "manifest", tmp_path / "data", name="mine", splits={"train": manifest, "test": manifest}
    )
    assert folder == tmp_path / "data" / "mine" / "1.0.0"
    records = {record["match_id"]: record for record in records_of(folder, "test")}
    assert set(records) == {b"x", str(tmp_path / "still.png").encode()}
    assert len(records[b"x"]["captions"]) == 2 and records[b"x"]["media_type"] == b"video"
    assert questions_of(records[b"x"]) == [Question("what?", "a dog", "", ("a dog", "a cat"))]
    assert records[b"x"]["source"].endswith(b"train.jsonl:1")
    still = records[str(tmp_path / "still.png").encode()]
    assert still["media_type"] == b"image" and list(still["labels"]) == [b"color"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "not JSON"),
        ([1], "must be one JSON object"),
        ({"caption": "a"}, "field 'media' is missing"),
        ({"media": "m"}, "a field 'caption', 'captions', 'question', 'questions' or 'labels' is"),
        ({"media": "m", "caption": "a", "captions": ["a"]}, "one of the fields"),
        ({"media": 3, "caption": "a"}, "field 'media' must be text"),
        ({"media": "m", "caption": ["a"]}, "field 'caption' must be text"),
        ({"media": "m", "captions": "a"}, "field 'captions' must be a list of texts"),
        ({"media": "m", "caption": "a", "labels": [1]}, "field 'labels' must be a list of texts"),
        ({"media": "m", "caption": "a", "type": "gif"}, "field 'type' must be 'video' or 'image'"),
        ({"media": "m", "caption": "a", "captoin": "a"}, "unknown field 'captoin'"),
        (
            {"media": "clip.mp4", "caption": "a", "questions": ["q"]},
            "'questions' must hold objects",
        ),
        (
            {"media": "clip.mp4", "caption": "a", "questions": [{"question": "q"}]},
            "field 'questions': 'answer' must be text",
        ),
        (
            {
                "media": "clip.mp4",
                "caption": "a",
                "questions": [{"question": "q", "answer": "a", "options": ["b", "c"]}],
            },
            "'answer' is not one of the 'options'",
        ),
        (
            {
                "media": "clip.mp4",
                "caption": "a",
                "questions": [{"q": 1, "question": "q", "answer": "a"}],
            },
            "field 'questions': unknown field 'q'",
        ),
    ],
)
def test_malformed_lines_name_file_line_and_field(tmp_path, clip, line, message):
    (tmp_path / "clip.mp4").write_bytes(clip)
    path = write_manifest(tmp_path, [{"media": "clip.mp4", "caption": "a dog"}, line])
    builder = Manifest(name="mine", splits={"train": path}, data_dir=tmp_path)
    with pytest.raises(ValueError) as error:
        build(builder)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert not list(tmp_path.glob("mine/*/dataset_info.json"))


def test_missing_media_are_counted_by_line(tmp_path, clip):
    (tmp_path / "clip.mp4").write_bytes(clip)
    lines = [{"media": name, "caption": "a dog"} for name in ("clip.mp4", "none.mp4")]
    path = write_manifest(tmp_path, lines)
    message = rf"1 without a media file; first: {path}:2 \({tmp_path}/none.mp4\)\)"
    with pytest.raises(ValueError, match=message):
        prepare("manifest", tmp_path, name="mine", splits={"train": path})


def test_manifest_arguments_are_checked(tmp_path):
    path = write_manifest(tmp_path, [])
    with pytest.raises(ValueError, match="name at least one split"):
        Manifest(name="mine", splits={}, data_dir=tmp_path)
    with pytest.raises(ValueError, match="'My data' must be letters"):
        Manifest(name="My data", splits={"train": path}, data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"split 'test': .*none.jsonl: no such file"):
        Manifest(name="mine", splits={"test": tmp_path / "none.jsonl"}, data_dir=tmp_path)
    with pytest.raises(ValueError, match="split 'train' has no usable example"):
        prepare("manifest", tmp_path, name="mine", splits={"train": path})


def test_prepare_clears_leftovers_and_runs_once(tmp_path, monkeypatch, clip):
    for name in ("incomplete.ABCDEF_1.0.0", "incomplete.1.0.0"):  # of TFDS; before the plan
        leftover = tmp_path / "listed" / name
        leftover.mkdir(parents=True)
        (leftover / "half").write_text("")
    monkeypatch.setitem(prepare_module.BUILDERS, "listed", f"{__name__}:Listed")
    folder = prepare("listed", tmp_path, splits={"train": [example(clip)]})
    assert not list(tmp_path.glob("listed/incomplete*")) and (folder / "vocab.txt").is_file()
    stamp = (folder / "vocab.txt").stat().st_mtime_ns
    assert prepare("listed", tmp_path, splits={}) == folder
    assert (folder / "vocab.txt").stat().st_mtime_ns == stamp


def test_interrupted_preparation_can_be_run_again(tmp_path, clip):
    def interrupted():
        yield example(clip)
        raise KeyboardInterrupt

    builder = Listed(data_dir=tmp_path, splits={"train": interrupted()})
    with pytest.raises(KeyboardInterrupt):
        build(builder)
    assert not (tmp_path / "listed" / "1.0.0").exists()
    again = Listed(data_dir=tmp_path, splits={"train": [example(clip)]})
    folder = build(again)
    assert len(records_of(folder, "train")) == 1


def test_unknown_data_sets_list_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'youcook'; known: shapes, .*visual_genome\..*--split"):
        prepare("youcook", tmp_path)


def test_command_line():
    name, options = parse_args(["shapes", "--data-dir", "d", "--max-bad-ratio", "0.1"])
    assert name == "shapes" and options == {"data_dir": "d", "max_bad_ratio": 0.1}
    words = ["manifest", "--name", "mine", "--split", "train=a=b.jsonl", "--split", "test=c"]
    _, options = parse_args(words)
    assert options["name"] == "mine" and options["splits"] == {"train": "a=b.jsonl", "test": "c"}
    words = ["msrvtt_qa", "--manual-dir", "m", "--allow-other-counts"]
    _, options = parse_args(words)
    assert options["manual_dir"] == "m" and options["allow_other_counts"]
    for wrong in (
        ["shapes", "--manual-dir=m"],
        ["manifest"],
        ["manifest", "--name", "x", "--split", "t"],
        ["shapes", "--name=x"],
    ):
        with pytest.raises(SystemExit):
            parse_args(wrong)


@pytest.mark.e2e
def test_command_line_ends_with_one_line_on_bad_input(tmp_path):
    command = [sys.executable, "-m", "vlmae", "prepare", "nothing", "--data-dir", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: unknown data set 'nothing'")
    assert run.stderr.count("\n") == 1


def test_a_folder_that_holds_another_set(tmp_path, clip):
    """Said, in place of silently doing nothing; the same command does nothing, from anywhere."""
    (tmp_path / "a.mp4").write_bytes(clip)
    one = write_manifest(tmp_path, [{"media": "a.mp4", "caption": "a dog"}], "one.jsonl")
    two = write_manifest(tmp_path, [{"media": "a.mp4", "caption": "a cat"}], "two.jsonl")
    made = prepare("manifest", tmp_path, name="mine", splits={"train": one})
    again = os.path.relpath(one)
    assert prepare("manifest", tmp_path, name="mine", splits={"train": again}) == made
    for splits in ({"train": two}, {"train": one, "test": two}):
        with pytest.raises(UserError, match=r"1\.0\.0 holds another set .manifests=.*two") as error:
            prepare("manifest", tmp_path, name="mine", splits=splits)
        assert "again with --overwrite, add these clips with --add" in str(error.value)
    source = SourceConfig("mine", "train")
    config = DataConfig(train=(source,), eval=source, data_dir=str(tmp_path))
    before = source_states(config)["mine/train"]
    added = prepare("manifest", tmp_path, name="mine", splits={"train": two}, add=True)
    after = source_states(config)["mine/train"]  # what a run compares when it goes on
    assert (before["records"], after["records"]) == (1, 2) and before["digest"] != after["digest"]
    for path in (one, two):  # each is a part of it
        assert prepare("manifest", tmp_path, name="mine", splits={"train": path}) == added
    write_manifest(tmp_path, [{"media": "a.mp4", "caption": "the dog"}], "one.jsonl")
    with pytest.raises(UserError, match=r"one\.jsonl has changed since"):
        prepare("manifest", tmp_path, name="mine", splits={"train": one})
    one.unlink()  # inputs may go once they are stored
    two.unlink()
    assert prepare("shapes", tmp_path, num_train=2, num_val=1, num_test=1, frame_size=16)
    assert prepare("shapes", tmp_path).name == "1.1.0"
    with pytest.raises(UserError, match=r"1\.1\.0 holds another set .num_clips"):
        prepare("shapes", tmp_path, num_train=3)
