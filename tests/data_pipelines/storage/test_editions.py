"""Published files as they lie in the world: editions of other counts, names of other scripts."""

import pytest
from published_sets import (
    CRC,
    FILES,
    MC_HEADER,
    MEDIA,
    activity_answer,
    activity_question,
    described,
)

from data_pipelines.schema.checks import UserError
from data_pipelines.storage.builders.annotation import Counts
from data_pipelines.storage.builders.didemo import Didemo
from data_pipelines.storage.builders.msvd import MsvdQA
from data_pipelines.storage.builders.tgif import REMOVED_GIFS, TgifAction
from data_pipelines.storage.prepare import prepare

TWICE = [
    described("c@N00_1.mov", "a dog runs"),
    described("d@N00_2.avi", "a cat"),
    described("c@N00_1.mp4", "it stops"),
]


def test_videos_named_twice_are_one_clip(manual_dir, read_back, capfd):
    folder = manual_dir(FILES["didemo"] | {"test_data.json": TWICE}, MEDIA["didemo"])
    splits = read_back("didemo", folder)
    captions = {item.match_id: item.captions for item in splits["test"]}
    assert captions == {"c@N00_1.mov": ["a dog runs it stops"], "d@N00_2.avi": ["a cat"]}
    report = capfd.readouterr().err
    assert "split 'test': 1 videos are named twice" in report and "split 'val': 1" not in report


def test_a_list_says_which_name_counts(manual_dir, read_back, capfd):
    lists = {"test_data.json": TWICE, "test_list.txt": "c@N00_1.mp4\nd@N00_2.avi\n"}
    folder = manual_dir(FILES["didemo"] | lists, MEDIA["didemo"])
    captions = {x.match_id: x.captions for x in read_back("didemo", folder)["test"]}
    assert captions == {"c@N00_1.mp4": ["it stops"], "d@N00_2.avi": ["a cat"]}
    assert "named twice" not in capfd.readouterr().err


def test_videos_named_twice_count_once(tmp_path, manual_dir, monkeypatch, capfd):
    counts = {"train": Counts(clips=2), "val": Counts(clips=1), "test": Counts(clips=2)}
    monkeypatch.setattr(Didemo, "published", counts)
    folder = manual_dir(FILES["didemo"] | {"test_data.json": TWICE}, MEDIA["didemo"])
    assert prepare("didemo", tmp_path, manual_dir=folder).is_dir()


def test_msvd_with_the_captions_of_clip4clip(manual_dir, read_back):
    captions = {"raw-captions.json": {"a_0_5": [["a", "dog"]], "b_1_2": [["a", "cat"], ["cats"]]}}
    files = {name: text for name, text in FILES["msvd"].items() if name.endswith("list.txt")}
    folder = manual_dir(files | {"raw-captions.pkl": "x"}, MEDIA["msvd"])
    with pytest.raises(UserError, match=r"raw-captions.pkl: a pickle can run any code"):
        read_back("msvd", folder)
    splits = read_back("msvd", manual_dir(captions))
    assert splits["test"][0].captions == ["a cat", "cats"]


def test_a_known_edition_is_named(tmp_path, manual_dir, monkeypatch, capfd):
    right = dict.fromkeys(("val", "test"), Counts(clips=1, questions=1))
    monkeypatch.setattr(MsvdQA, "published", {"train": Counts(2, 0, 2), **right})
    monkeypatch.setattr(MsvdQA, "editions", {"of the archive": {"train": Counts(1, 0, 2)}})
    folder = manual_dir(FILES["msvd_qa"], MEDIA["msvd_qa"])
    assert prepare("msvd_qa", tmp_path, manual_dir=folder).is_dir()
    assert "msvd_qa: split 'train' is that of the archive\n" in capfd.readouterr().err
    monkeypatch.setattr(MsvdQA, "editions", {"of the archive": {"train": Counts(1, 0, 3)}})
    with pytest.raises(UserError, match=r"split 'train' has 1 clips .* published are 2; if"):
        prepare("msvd_qa", tmp_path / "again", manual_dir=folder)


def tgif_files(num_rows, gif="a"):
    row = f"{gif}\tWhat does it do 2 times ?\trun\tjump\tsit\teat\tbark\t4\tACTION4\t26\n"
    tables = {"Train_action_question.csv": row * num_rows, "Test_action_question.csv": row}
    return {name: MC_HEADER + rows for name, rows in tables.items()}


@pytest.mark.parametrize(
    ("num_rows", "gif", "known"),
    [(8, "a", True), (7, "a", False), (9, "a", False), (8, min(REMOVED_GIFS), False)],
)
def test_tgif_tables_without_the_removed_gifs(
    tmp_path, manual_dir, monkeypatch, capfd, num_rows, gif, known
):
    counts = {"train": Counts(questions=12), "test": Counts(questions=1)}
    monkeypatch.setattr(TgifAction, "published", counts)
    folder = manual_dir(tgif_files(num_rows, gif), [f"videos/{gif}.gif"])
    if known:
        assert prepare("tgif_action", tmp_path, manual_dir=folder).is_dir()
        assert "since commit a43d8c3, which removed the 4 rows" in capfd.readouterr().err
        return
    with pytest.raises(UserError, match=f"has {num_rows} questions .* published are 12"):
        prepare("tgif_action", tmp_path, manual_dir=folder)


@pytest.mark.parametrize("file", ["v_v_abc.mp4", "v_abc.mkv"])
def test_ids_that_begin_with_v(manual_dir, read_back, file):
    questions = {
        f"{split}_{letter}.json": content
        for split in ("train", "val", "test")
        for letter, content in (
            ("q", [activity_question("v_abc")]),
            ("a", [activity_answer("v_abc")]),
        )
    }
    splits = read_back("activitynet_qa", manual_dir(questions, [f"videos/{file}"]))
    assert splits["test"][0].match_id == "v_abc"
    captions = {"v_v_abc": {"sentences": ["A dog."]}}
    files = {"train.json": captions, "val_1.json": captions}
    splits = read_back("activitynet", manual_dir(files, [f"videos/{file}"]))
    assert splits["train"][0].match_id == "v_v_abc"


@pytest.mark.parametrize(
    ("name", "media"),
    [
        ("hvu", ["videos/abcdefghijk_000001_000011_.mp4"]),
        ("cc3m", [f"images/training/0_{CRC}", f"images/validation/0_{CRC}"]),
        ("cc12m", [f"images/training/0_{CRC}.jpg"]),
        ("cc12m", [f"images/0_{CRC}"]),
        ("cc12m", [f"images/training/{CRC}"]),
        ("tgif_action", ["videos/a.m2ts"]),
        ("didemo", ["videos/c@N00_1.", "videos/d@N00_2.mts"]),
    ],
)
def test_media_named_by_other_scripts(manual_dir, read_back, name, media):
    assert all(read_back(name, manual_dir(FILES[name], media)).values())
