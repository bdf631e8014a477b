"""Parquet files as Hugging Face keeps data sets, with media and texts of our own."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Question
from data_pipelines.storage.builders import parquet

MEDIA_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, media, column="image", group=2, **columns):
    values = [item if isinstance(item, dict) else {"bytes": item, "path": "x"} for item in media]
    table = pa.table({column: pa.array(values, MEDIA_TYPE), **columns})
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def read_files(read_train):
    return lambda pattern="*.parquet", **options: read_train("parquet", pattern, **options)


def test_images_with_one_caption_or_a_list(tmp_path, small_media, read_files):
    jpg, png = small_media[".jpg"], small_media[".png"]
    write(tmp_path / "train-0.parquet", [jpg, png, jpg, jpg, png], text=list("abcde"))
    write(tmp_path / "train-1.parquet", [png], caption=[["a dog", "the dog"]], url=["x"])
    examples = {item.match_id: item for item in read_files("train-*.parquet")}
    said = {match_id: item.captions for match_id, item in examples.items()}
    assert said == {f"train-0/{i}": [c] for i, c in enumerate("abcde")} | {
        "train-1/0": ["a dog", "the dog"]
    }
    media = [examples[f"train-0/{i}"].media for i in range(5)]
    assert media == [jpg, png, jpg, jpg, png] and examples["train-1/0"].media == png
    assert {item.media_type for item in examples.values()} == {"image"}


def test_clips_with_questions(tmp_path, small_media, read_files):
    clip = small_media[".mp4"]
    write(
        tmp_path / "a.parquet",
        [clip, clip],
        column="video",
        video_id=["v7", "v7"],
        question=["what?", "who?"],
        answer=["1", "a dog"],
        options=[["a dog", "a cat"], None],
    )
    first, second = read_files()
    assert first.match_id == second.match_id == "v7" and first.media_type == "video"
    assert first.questions == [Question("what?", "a cat", "", ("a dog", "a cat"))]
    assert second.questions == [Question("who?", "a dog", "")] and second.media == clip


def test_plain_bytes_and_files_beside(tmp_path, small_media, read_files):
    table = pa.table({"jpg": [small_media[".jpg"]], "txt": ["a dog"], "__key__": ["a"]})
    pq.write_table(table, tmp_path / "a.parquet")
    [example] = read_files("a.parquet", fields={"caption": "txt"})
    assert example.media == small_media[".jpg"] and example.media_type == "image"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "1.mp4").write_bytes(small_media[".mp4"])
    paths = [{"bytes": None, "path": "m/1.mp4"}, {"bytes": None, "path": "m/2.mp4"}, None]
    values = pa.array(paths, MEDIA_TYPE)
    pq.write_table(pa.table({"video": values, "text": list("abc")}), tmp_path / "b.parquet")
    [example] = read_files("b.parquet", name="other", max_bad_ratio=0.7)
    assert example.media == small_media[".mp4"] and example.captions == ["a"]


def test_row_groups_are_read_once(tmp_path, small_media, read_files, monkeypatch):
    read, groups = pq.ParquetFile.read_row_group, []

    def counted(self, group, columns):
        groups.append((group, tuple(columns)))
        return read(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    write(tmp_path / "a.parquet", [small_media[".jpg"]] * 5, text=list("abcde"))
    assert len(read_files()) == 5
    texts, media = [(i, ("text",)) for i in range(3)], [(i, ("image",)) for i in range(3)]
    assert groups == texts + media


def test_rows_without_a_text_are_skipped(tmp_path, small_media, read_files):
    write(tmp_path / "a.parquet", [small_media[".jpg"]] * 2, text=["a", None])
    with pytest.raises(UserError, match=r"1 with unreadable texts; first: .*a.parquet\[1\]"):
        read_files()
    assert len(read_files(max_bad_ratio=0.5)) == 1


def test_files_without_media_are_refused_with_advice(tmp_path, read_files):
    pq.write_table(pa.table({"video": ["a.mp4"], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column of media .* video, text; say which by --fiel"):
        read_files()
    (tmp_path / "b.parquet").write_text("x")
    with pytest.raises(UserError, match=r"b.parquet: not a Parquet file"):
        read_files("b.parquet")
    table = pa.table({"one": [b"x"], "two": [b"y"], "text": ["a"]})
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(UserError, match="no column of media"):
        read_files("c.parquet")
    schema = table.schema
    assert parquet.media_column(schema, "c", parquet.fields_of({"media": "two"})) == "two"
