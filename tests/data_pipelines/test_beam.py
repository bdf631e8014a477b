"""Preparation with Apache Beam stores what preparation in one process stores."""

import pytest

from data_pipelines.prepare import parse_args, prepare

pytest.importorskip("apache_beam")


def entry(number, question="what runs?"):
    return {"question": question, "answer": "dog", "video_id": number}


@pytest.fixture
def folder(manual_dir):
    train = [entry(1), entry(1), entry(2, "who runs?"), entry(3), entry(4)]
    files = {"train_qa.json": train, "val_qa.json": [entry(1)], "test_qa.json": [entry(2)]}
    folder = manual_dir(files, ["videos/video1.mp4", "videos/video2.mp4"])
    (folder / "videos" / "video4.mp4").write_bytes(b"no video")
    return folder


def test_beam_stores_the_same(tmp_path, folder, read_folder, capfd):
    options = {"manual_dir": folder, "allow_other_counts": True, "max_bad_ratio": 0.5}
    plain = prepare("msrvtt_qa", tmp_path / "plain", **options)
    report = capfd.readouterr().err
    beam = prepare("msrvtt_qa", tmp_path / "beam", beam_options=[], **options)
    assert read_folder(beam) == read_folder(plain) and len(read_folder(beam)["train"]) == 2
    assert (beam / "vocab.txt").read_text() == (plain / "vocab.txt").read_text()
    lines = [sorted((path / "skipped.jsonl").read_text().splitlines()) for path in (plain, beam)]
    assert lines[0] == lines[1] and len(lines[0]) == 3
    assert "stored train 2, val 1, test 1" in report
    assert "stored train 2, val 1, test 1" in capfd.readouterr().err
    assert not list(beam.glob("tasks*"))


def test_too_many_bad_examples_stop(tmp_path, folder):
    options = {"manual_dir": folder, "allow_other_counts": True, "beam_options": []}
    with pytest.raises(ValueError, match="2 of 6 examples cannot be used"):
        prepare("msrvtt_qa", tmp_path, max_bad_ratio=0.1, **options)
    (folder / "videos" / "video2.mp4").unlink()
    with pytest.raises(ValueError, match=r"split 'test' has no usable example \(3 without a media"):
        prepare("msrvtt_qa", tmp_path, max_bad_ratio=1.0, **options)
    assert not list(tmp_path.glob("msrvtt_qa/1.0.0"))


def test_command_line():
    _, options = parse_args(["hvu", "--manual-dir=m", "--beam-options=--runner=X --a 'b c'"])
    assert options["beam_options"] == ["--runner=X", "--a", "b c"]
