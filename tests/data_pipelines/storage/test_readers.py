"""Text, JSON and tables as people save them: marks, encodings, separators, quotation marks."""

import json
from pathlib import Path

import pytest

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Question
from data_pipelines.storage import tasks
from data_pipelines.storage.builders import readers

BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(BOM + b'{"a": 1}\n')
    assert readers.read_json(path, dict) == {"a": 1}
    assert [entry for _, entry in readers.read_json_lines(path)] == [{"a": 1}]
    path.write_bytes(BOM + b"video_id,sentence\nv1,a dog\n")
    [(place, row)] = readers.read_table(path, ["video_id"])
    assert place == f"{path}:2" and row == {"video_id": "v1", "sentence": "a dog"}


@pytest.mark.parametrize("separator", readers.SEPARATORS)
def test_the_separator_of_a_table_is_found(tmp_path, separator):
    path = tmp_path / "table.csv"
    path.write_text(separator.join(("key", "video_id", "sentence")) + "\n" + separator.join("abc"))
    for columns in (["video_id", "sentence"], []):
        [(_, row)] = readers.read_table(path, columns)
        assert row == {"key": "a", "video_id": "b", "sentence": "c"}


def test_other_encodings_name_file_and_line(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "caf\xe9"}\n')
    with pytest.raises(UserError, match=rf"{path}:2: not UTF-8 \(byte 11 of the line\); convert"):
        list(readers.read_json_lines(path))


def test_utf_16_is_named(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("id,name\n1,a dog\n", "utf-16")
    with pytest.raises(UserError, match=rf"{path}:1: not UTF-8 .* iconv -f utf-16 -t utf-8"):
        list(readers.read_table(path, ["id", "name"]))


def test_tasks_of_any_source_can_be_stored():
    """Tables, tar members and file names bring half pairs too; the path must find its file."""
    half = "a \ud83d dog"
    question = Question(half, half, half, (half, "b"))
    task = tasks.Task("\udce9.mp4", 1, "video", (half,), half, half, (question,), (half,))
    stored = tasks._parse_task(tasks._format_task(task), Path("tasks"))
    good, asked = "a ? dog", Question("a ? dog", "a ? dog", "a ? dog", ("a ? dog", "b"))
    assert stored == tasks.Task("\udce9.mp4", 1, "video", (good,), good, good, (asked,), (good,))
    whole = tasks.Task("a.mp4", 1, captions=("😀 é",))
    assert tasks._parse_task(tasks._format_task(whole), Path("tasks")) == whole


def test_cut_emoji_can_be_stored_and_whole_ones_stay(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('["a \\ud83d dog", "\\ud83d\\ude00", "\\u00e9"]')
    assert readers.read_json(path, list) == ["a ? dog", "😀", "é"]
    path.write_text(json.dumps(["é"]))
    assert readers.read_json(path, list) == ["é"]


@pytest.mark.parametrize("count", [200, 20_000])  # the second is beyond the longest field of `csv`
def test_a_missing_quotation_mark_names_its_line(tmp_path, count):
    path = tmp_path / "table.csv"
    rows = ["1,a cat", '2,"a dog', *(f"{i},a bird" for i in range(count))]
    path.write_text("\n".join(["id,name", *rows]))
    with pytest.raises(UserError, match=rf"{path}:3: a field does not end; is a quotation mark"):
        list(readers.read_table(path, ["id", "name"]))


def test_a_caption_may_have_line_breaks(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('id,name\n1,"a dog\nruns"\n2,a cat\n')
    assert [(place, row["name"]) for place, row in readers.read_table(path, ["name"])] == [
        (f"{path}:3", "a dog\nruns"),
        (f"{path}:4", "a cat"),
    ]
