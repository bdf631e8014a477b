"""What all builders of published data sets share: counts, missing media, repeated and bad texts."""

import json
from unittest import mock

import pytest

from data_pipelines.media import decode
from data_pipelines.schema.records import Question
from data_pipelines.storage.builders.annotation import Annotation, Counts, clean, count, merge
from data_pipelines.storage.builders.media import MediaFolder
from data_pipelines.storage.builders.msrvtt import MsrvttQA
from data_pipelines.storage.prepare import BUILDERS, PUBLISHED, prepare


def entry(video_id, question="what runs ?", answer="dog"):
    return {"question": question, "answer": answer, "video_id": video_id, "id": 0}


def qa_files(train, rest=(7,)):
    others = [entry(number) for number in rest]
    return {"train_qa.json": train, "val_qa.json": others, "test_qa.json": others}


def test_another_count_than_the_published_one_is_refused(tmp_path, manual_dir, monkeypatch):
    folder = manual_dir(qa_files([entry(1), entry(1, "who runs ?")]), ["videos/video1.mp4"])
    with pytest.raises(ValueError) as error:
        prepare("msrvtt_qa", tmp_path, manual_dir=folder)
    assert str(error.value) == (
        "msrvtt_qa: split 'train' has 1 clips in its annotation files, published are 6,513; "
        "if that is meant, add --allow-other-counts"
    )
    right = dict.fromkeys(("val", "test"), Counts(clips=1, questions=1))
    monkeypatch.setattr(MsrvttQA, "published", {"train": Counts(1, 0, 3), **right})
    with pytest.raises(ValueError, match=r"has 2 questions .* published are 3"):
        prepare("msrvtt_qa", tmp_path, manual_dir=folder)
    monkeypatch.setattr(MsrvttQA, "published", {"train": Counts(1, 0, 2), **right})
    (folder / "videos" / "video7.mp4").write_bytes((folder / "videos/video1.mp4").read_bytes())
    assert prepare("msrvtt_qa", tmp_path, manual_dir=folder).is_dir()


def test_missing_media_are_counted(manual_dir, read_back, capfd):
    train = [entry(number) for number in (1, 2, 3)]
    folder = manual_dir(qa_files(train), ["videos/video1.mp4", "videos/sub/video7.webm"])
    message = r"2 of 5 examples .*2 without a media file; first: .*\[1\] \(.*/videos: video2\)"
    with (
        mock.patch.object(decode, "check_media", side_effect=AssertionError("decodes")),
        pytest.raises(ValueError, match=message),
    ):
        read_back("msrvtt_qa", folder)
    splits = read_back("msrvtt_qa", folder, max_bad_ratio=0.5)
    assert [example.match_id for example in splits["train"]] == ["video1"]
    assert [example.match_id for example in splits["test"]] == ["video7"]


def test_empty_and_repeated_texts_are_left_out_and_counted(tmp_path, manual_dir, read_back, capfd):
    train = [entry(1), entry(1), entry(1, answer=" "), entry(1, "who runs ?")]
    folder = manual_dir(qa_files(train, rest=(7, 7)), ["videos/video1.mp4", "videos/video7.mp4"])
    splits = read_back("msrvtt_qa", folder)
    questions = [question.question for question in splits["train"][0].questions]
    assert questions == ["what runs ?", "who runs ?"]
    assert len(splits["test"][0].questions) == 2  # each is a query of the published figure
    report = capfd.readouterr().err
    assert "left out 1 repeated questions" in report and "left out 1 empty questions" in report
    lines = (tmp_path / "data/msrvtt_qa/1.0.0/skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["whole"] for line in lines] == [False, False]


def test_annotations_without_any_text_are_skipped(manual_dir, read_back):
    folder = manual_dir(qa_files([entry(1), entry(2, answer="")]), ["videos/video1.mp4"])
    with pytest.raises(ValueError, match="1 without a text"):
        read_back("msrvtt_qa", folder)


def test_missing_annotation_files_and_folders_are_named(tmp_path, manual_dir):
    folder = manual_dir({"val_qa.json": []})
    with pytest.raises(FileNotFoundError, match=r"train_qa.json: no such file; it is from the MSR"):
        prepare("msrvtt_qa", tmp_path, manual_dir=folder)
    with pytest.raises(FileNotFoundError, match=r"train_qa.json: .*test_qa.json: .*videos: no suc"):
        prepare("msrvtt_qa", tmp_path, manual_dir=folder)
    with pytest.raises(ValueError, match="msrvtt_qa: --manual-dir DIR must name the folder"):
        prepare("msrvtt_qa", tmp_path)
    folder = manual_dir(qa_files([entry(1)]))
    with pytest.raises(FileNotFoundError, match="manual/videos: no such folder"):
        prepare("msrvtt_qa", tmp_path, manual_dir=folder, allow_other_counts=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "train_qa.json: not JSON"),
        ({}, "train_qa.json: must hold a list"),
        ([entry(1), 3], r"train_qa.json\[1\]: must be an object"),
        ([{"question": "q", "answer": "a"}], r"\[0\]: field 'video_id' is missing"),
        ([entry("1")], r"\[0\]: field 'video_id' must be a whole number"),
        ([entry(1, question=None)], r"\[0\]: field 'question' must be text"),
    ],
)
def test_malformed_entries_name_file_entry_and_field(tmp_path, manual_dir, content, message):
    folder = manual_dir(qa_files(content), ["videos/video1.mp4"])
    with pytest.raises(ValueError, match=message):
        prepare("msrvtt_qa", tmp_path, manual_dir=folder, allow_other_counts=True)
    assert not list(tmp_path.glob("msrvtt_qa/*/dataset_info.json"))


def test_merge_and_count():
    question = Question("q", "a", "")
    parts = [
        Annotation("x", "f:1", ("one",)),
        Annotation("y", "f:2", questions=(question,)),
        Annotation("x", "f:3", ("two",), (question,)),
    ]
    merged = list(merge(parts))
    assert merged[0] == Annotation("x", "f:1", ("one", "two"), (question,))
    assert [item.media for item in merged] == ["x", "y"]
    assert count(parts) == Counts(3, 2, 2) and count(merged) == Counts(2, 2, 2)


def test_clean_keeps_the_order():
    annotation = Annotation("x", "f:1", ("b", "", "a", "b"), (Question("", "a", "", ("a",)),))
    kept, dropped = clean(annotation, drop_repeats=True)
    assert kept.captions == ("b", "a") and len(kept.questions) == 1
    assert [item.reason for item in dropped] == ["empty captions", "repeated captions"]
    kept, _ = clean(annotation, drop_repeats=False)
    assert kept.captions == ("b", "a", "b")


def test_media_are_found_by_path_stem_and_ending(manual_dir):
    names = ["a.avi", "a.mp4", "sub/b.0.5.webm", "c.mov.mp4", "d.mp4", "sub/d.mp4", "e.txt.png"]
    root = manual_dir({"media/f.txt": ""}, [f"media/{name}" for name in names]) / "media"
    media = MediaFolder(root)
    for name, file in {
        "a": "a.mp4",
        "a.avi": "a.avi",
        "a.mkv": "a.mp4",
        "b.0.5": "sub/b.0.5.webm",
        "elsewhere/b.0.5.mp4": "sub/b.0.5.webm",
        "c": "c.mov.mp4",
        "c.mov": "c.mov.mp4",
        "sub/d.mp4": "sub/d.mp4",
        "e.txt": "e.txt.png",
    }.items():
        path = root / file
        assert media.find(name) == (str(path), path.stat().st_size), name
    assert media.find("f") is None and media.find("b.0") is None
    with pytest.raises(ValueError, match="several files for 'd'"):
        media.find("d")
    exact = MediaFolder(root, search=False)
    assert exact.find("sub/d.mp4")[0] == str(root / "sub/d.mp4") and exact.find("a") is None


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_every_published_data_set_documents_itself(tmp_path, name):
    module, _, class_name = BUILDERS[name].partition(":")
    builder_class = getattr(__import__(module, fromlist=[class_name]), class_name)
    assert builder_class.name == name and builder_class.origin
    assert "Expects" in builder_class.__doc__
    with pytest.raises(ValueError, match=f"{name}: --manual-dir"):
        prepare(name, tmp_path)
