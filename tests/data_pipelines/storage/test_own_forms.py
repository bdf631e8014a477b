"""The forms in which people hold clips of their own, each prepared by the command line."""

import json
import os
import re
import sys
from pathlib import Path

import clips
import pytest

from data_pipelines.schema.records import Question
from data_pipelines.storage import build
from data_pipelines.storage.builders.recognize import describe_folder
from data_pipelines.storage.prepare import main

MARK = "\N{BYTE ORDER MARK}"
COMMA, QUOTE = "a dog, fast", 'a "good" dog'
TABLE = f'media,caption\na.mp4,"{COMMA}"\na.mp4,"a ""good"" dog"\nb.mp4,a cat\n'
ENTRIES = [
    {"media": "a.mp4", "captions": [COMMA, QUOTE]},
    {"media": "b.mp4", "caption": "a cat"},
]
CAPTIONS = {"a.mp4": [COMMA, QUOTE], "b.mp4": ["a cat"]}


@pytest.fixture(scope="module")
def clip():
    return clips.write_clip([0, 40, 80])


@pytest.fixture
def folder(tmp_path, clip):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(clip)
    return tmp_path


@pytest.fixture
def prepared(folder, read_folder, capsys):
    """Prepares a file or folder as the split `train`, and returns its examples by media."""

    def prepared(path, *flags, kind="manifest"):
        words = [kind, "--name", "mine", f"--split=train={path}"]
        main([*words, "--data-dir", str(folder / "data"), *flags])
        made = capsys.readouterr().out.strip()
        items = read_folder(type(folder)(made))["train"]
        return {item.match_id.removeprefix(f"{folder}/"): item for item in items}

    return prepared


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", TABLE),
        ("marked.csv", MARK + TABLE),
        ("windows.csv", MARK + TABLE.replace("\n", "\r\n")),
        ("a.tsv", f"media\tcaption\na.mp4\t{COMMA}\na.mp4\t{QUOTE}\nb.mp4\ta cat\n"),
        ("spreadsheet.csv", f'File;Caption\na.mp4;{COMMA}\na.mp4;"a ""good"" dog"\nb.mp4;a cat\n'),
        ("bars.csv", 'path,captions\na.mp4,"a dog, fast|a ""good"" dog"\nb.mp4,a cat\n'),
        ("list.json", ENTRIES),
        ("list of one caption each.json", [{"media": m, "caption": c} for m in CAPTIONS
                                           for c in CAPTIONS[m]]),
        ("lines.jsonl", "\n".join(map(json.dumps, ENTRIES))),
        ("marked.jsonl", MARK + "\n".join(map(json.dumps, ENTRIES))),
    ],
)  # fmt: skip
def test_captions(folder, prepared, name, text):
    found = prepared(write(folder, name, text))
    assert {media: list(item.captions) for media, item in found.items()} == CAPTIONS


DOGS = Question("what runs?", "a dog", "", ("a dog", "a cat"))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("open.csv", "media,question,answer\na.mp4,what runs?,a dog\n",
         Question("what runs?", "a dog", "")),
        ("bars.csv", "media,question,options,answer\na.mp4,what runs?,a dog|a cat,a dog\n", DOGS),
        ("place.csv", "media,question,a0,a1,answer\na.mp4,what runs?,a dog,a cat,0\n", DOGS),
        ("numbered.csv", "media,question,option_1,option_2,answer\na.mp4,what runs?,a dog,a cat,"
         "a dog\n", DOGS),
        ("flat.jsonl", json.dumps({"media": "a.mp4", "question": "what runs?", "answer": 0,
                                   "options": ["a dog", "a cat"]}), DOGS),
        ("nested.json", [{"media": "a.mp4", "questions": [
            {"question": "what runs?", "answer": "a dog", "options": ["a dog", "a cat"]}]}], DOGS),
    ],
)  # fmt: skip
def test_questions_alone(folder, prepared, name, text, expected):
    [item] = prepared(write(folder, name, text)).values()
    assert item.questions == [expected] and item.captions == []


def test_questions_of_a_clip_are_joined_in_a_table(folder, prepared):
    rows = ["a.mp4,what?,dog,runs", "a.mp4,who?,rex,runs", "b.mp4,what?,cat,sits"]
    path = write(folder, "a.csv", "\n".join(["video,question,answer,caption", *rows]))
    found = prepared(path)
    assert [question.answer for question in found["a.mp4"].questions] == ["dog", "rex"]
    assert found["a.mp4"].captions == ["runs"] and found["b.mp4"].captions == ["sits"]


def test_labels_of_a_table(folder, prepared):
    found = prepared(write(folder, "a.csv", "media,label\na.mp4,dog | animal\nb.mp4,cat\n"))
    assert found["a.mp4"].labels == ["dog", "animal"] and found["b.mp4"].labels == ["cat"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "media,labels\na.mp4,dog\nb.mp4,\n"),
        ("a.json", [{"media": "a.mp4", "labels": ["dog"]}, {"media": "b.mp4", "labels": []}]),
    ],
)
def test_a_clip_may_have_none_of_the_labels(folder, prepared, name, text):
    found = prepared(write(folder, name, text))
    assert found["a.mp4"].labels == ["dog"] and found["b.mp4"].labels == []


def test_rows_of_another_split_are_left_out(folder, prepared):
    table = "media,caption,split\na.mp4,a dog,training\nb.mp4,a cat,test\n"
    assert [*prepared(write(folder, "a.csv", table))] == ["a.mp4"]
    with pytest.raises(SystemExit, match=r"no split 'train'; it has test"):
        prepared(write(folder, "b.csv", table.replace("training", "test")), "--name=other")


def test_columns_and_folders_of_other_names(folder, prepared, capsys):
    table = write(folder, "lists/a.csv", "Clip,what,seconds\na.mp4,a dog,3\nb.mp4,,2\n")
    flags = ["--field", "caption=what", "--media", str(folder), "--max-bad-ratio", "0.5"]
    found = prepared(table, *flags)
    assert [item.captions for item in found.values()] == [["a dog"]]
    skipped = (folder / "data" / "mine" / "1.0.0" / "skipped.jsonl").read_text()
    assert "a.csv:3" in skipped and "without a text" in skipped


def test_columns_that_are_not_read_are_named(folder, capsys):
    table = write(folder, "a.csv", "media,caption,seconds,url\na.mp4,a dog,3,x\n")
    main(["manifest", "--name=mine", f"--split=train={table}", f"--data-dir={folder}/data"])
    assert f"{table}: columns that are not read: seconds, url\n" in capsys.readouterr().err


def test_texts_beside_the_clips(folder, prepared, clip):
    (folder / "clips" / "more").mkdir(parents=True)
    for name in ("1.mp4", "2.mp4", "more/1.mov"):
        (folder / "clips" / name).write_bytes(clip)
    write(folder, "clips/1.txt", f"{MARK}a dog\n\n{COMMA}\r\n")
    write(folder, "clips/2.json", {"question": "what?", "answer": "a cat", "labels": ["cat"]})
    write(folder, "clips/more/1.txt", "a cat")
    found = prepared(folder / "clips", kind="folder")
    assert found["clips/1.mp4"].captions == ["a dog", COMMA]
    assert found["clips/2.mp4"].questions == [Question("what?", "a cat", "")]
    assert found["clips/2.mp4"].labels == ["cat"]
    assert found["clips/more/1.mov"].captions == ["a cat"]


def test_folders_of_classes(folder, prepared, clip):
    for name in ("dog/1.mp4", "dog/more/2.mp4", "a cat/1.mp4"):
        path = folder / "clips" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip)
    found = prepared(folder / "clips", kind="folder")
    assert {name: item.labels for name, item in found.items()} == {
        "clips/dog/1.mp4": ["dog"],
        "clips/dog/more/2.mp4": ["dog"],
        "clips/a cat/1.mp4": ["a cat"],
    }


def test_a_folder_that_changed_is_noticed(folder, prepared, clip):
    (folder / "clips").mkdir()
    (folder / "clips" / "1.mp4").write_bytes(clip)
    text = write(folder, "clips/1.txt", "a dog")
    prepared(folder / "clips", kind="folder")
    prepared(folder / "clips", kind="folder")  # nothing is new
    text.write_text("a cat")
    with pytest.raises(SystemExit, match="contents="):
        prepared(folder / "clips", kind="folder")
    text.write_text("a dog")
    (folder / "clips" / "2.mp4").write_bytes(clip)
    with pytest.raises(SystemExit, match="2 clips and images"):
        prepared(folder / "clips", kind="folder")


def test_what_lies_beside_no_text_is_counted(folder, prepared, clip, capsys):
    write(folder, "a.txt", "a dog")
    found = prepared(folder, "--max-bad-ratio", "0.5", kind="folder")
    assert [*found] == ["a.mp4"]
    skipped = (folder / "data" / "mine" / "1.0.0" / "skipped.jsonl").read_text()
    assert "b.mp4" in skipped and "without a text beside it" in skipped


@pytest.mark.parametrize(
    ("name", "text", "message", "example"),
    [
        ("a.csv", "a.mp4,a dog\nb.mp4,a cat\n", "no column for the media", "media,caption"),
        ("a.csv", "media,seconds\na.mp4,3\n", "no column for captions, labels or questions",
         "media,caption"),
        ("a.csv", "media,caption\na.mp4,a dog,fast\n", ":2: must have 2 fields",
         '"a dog runs, fast"'),
        ("a.csv", "media,question\na.mp4,what?\n", ":2: no field for the answer", "media,caption"),
        ("a.csv", "media,question,a0,a1,answer\na.mp4,what?,x,y,2\n", ":2: field 'answer' must be",
         "media,caption"),
        ("a.jsonl", '{"media": "a.mp4", "text": "a"}', ":1: unknown field 'text'", '"captions": ['),
        ("a.json", '[{"caption": "a"}]', "[0]: field 'media' is missing", '"question": "what'),
        ("a.jsonl", "media,caption", ":1: not JSON", '"captions": ['),
    ],
)  # fmt: skip
def test_errors_show_what_was_expected(folder, name, text, message, example):
    path = write(folder, name, text)
    with pytest.raises(SystemExit) as error:
        main(["manifest", "--name=mine", f"--split=train={path}", f"--data-dir={folder}/data"])
    first, expected, *good = str(error.value).splitlines()
    assert first.startswith(f"error: {path}") and message in first
    assert expected == "expected are lines such as:" and len(good) == 2
    assert example in "".join(good)


def test_folders_without_texts_show_what_was_expected(folder):
    with pytest.raises(SystemExit, match=r"have no texts beside them.*\n  clips/1\.mp4 and"):
        main(["folder", "--name=mine", f"--split=train={folder}", f"--data-dir={folder}/data"])
    (folder / "none").mkdir()
    with pytest.raises(SystemExit, match=r"none: holds no clip or image; expected"):
        main(["folder", "--name=mine", f"--split=train={folder}/none", f"--data-dir={folder}/d"])


def test_own_forms_are_recognized(folder, clip):
    table = write(folder, "all.csv", TABLE)
    line = f"manifest: vlmae prepare manifest --name {{}} --split train={table}"
    assert line.format("test_own_forms_are_recognized") in describe_folder(folder)
    table.unlink()
    for split in ("train", "test"):
        for name in ("dog", "cat"):
            path = folder / "sorted" / split / name
            path.mkdir(parents=True)
            (path / "1.mp4").write_bytes(clip)
    root = folder / "sorted"
    assert describe_folder(root) == (
        f"folder: vlmae prepare folder --name sorted --split test={root}/test "
        f"--split train={root}/train"
    )
    write(folder, "a.txt", "a dog")
    assert f"--split train={folder}" in describe_folder(folder)


def test_an_edit_is_noticed_and_a_touch_is_not(folder, prepared, capsys):
    path = write(folder, "a.csv", "media,caption\na.mp4,a dog\n")
    prepared(path)
    os.utime(path, (1, 1))
    prepared(path)  # the same text, of another time
    path.write_text("media,caption\na.mp4,a cat\n")  # of the same size
    with pytest.raises(SystemExit, match=r"a\.csv has changed since.*--overwrite"):
        prepared(path)
    found = prepared(path, "--overwrite")
    assert found["a.mp4"].captions == ["a cat"]
    assert prepared(path)["a.mp4"].captions == ["a cat"]
    versions = {item.name for item in (folder / "data" / "mine").iterdir() if item.is_dir()}
    assert versions == {"1.0.0", "1.0.1"}  # runs that read the old one keep it
    with pytest.raises(SystemExit, match="holds this part already"):
        os.utime(path, (2, 2))
        prepared(path, "--add")
    with pytest.raises(SystemExit, match="not with --overwrite"):
        prepared(path, "--add", "--overwrite")


def test_what_was_overwritten_halfway_begins_anew(folder, prepared, monkeypatch):
    path = write(folder, "a.csv", "media,caption\na.mp4,a dog\n")
    prepared(path)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_write", lambda *_: sys.exit("killed"))
        path.write_text("media,caption\na.mp4,a cat\n")
        with pytest.raises(SystemExit, match="killed"):
            prepared(path, "--overwrite")
    path.write_text("media,caption\na.mp4,an owl\n")
    assert prepared(path, "--overwrite")["a.mp4"].captions == ["an owl"]


def test_the_list_of_skipped_is_where_the_message_says(folder, capsys):
    rows = [f"a.mp4,a dog {i}\n" for i in range(30)] + ["none.mp4,a cat\n"]
    path = write(folder, "a.csv", "media,caption\n" + "".join(rows))
    words = ["manifest", "--name=mine", f"--split=train={path}", f"--data-dir={folder}/data"]
    with pytest.raises(SystemExit, match=r"--max-bad-ratio 0\.01 allows; see (.*)") as error:
        main(words)
    [listed] = re.findall(r"see (\S+)$", str(error.value))
    assert "none.mp4" in Path(listed).read_text()
    main([*words, "--max-bad-ratio", "0.5"])
    [listed] = re.findall(r"skipped, see (\S+)$", capsys.readouterr().err, re.MULTILINE)
    assert "none.mp4" in Path(listed).read_text()
