"""SSv2, LSMDC, HVU, the web and image sets, through the real builders."""

import pytest
from published_sets import CLIP, CRC, FILES, HVU, MEDIA, WEBVID

from data_pipelines.storage.prepare import prepare

# Data set -> split -> captions and match id of the first clip stored.
STORED = {
    "ssv2_label": {"train": ("holding a cup", "holding a cup"), "val": ("a cup", "a cup")},
    "ssv2_template": {"val": ("Hold", "Hold")},
    "lsmdc": {"train": ('SOMEONE says "hi.|B.', CLIP), "test": ("A.", CLIP)},
    "hvu": {"train": ("", "abcdefghijk_000015_000115")},
    "webvid_2m": {"train": ("A dog, running", "7"), "val": ("A dog, running", "7")},
    "webvid_10m": {"train": ("A dog, running", "7")},
    "cc3m": {"train": ('"a dog" runs', str(CRC)), "val": ("a dog", str(CRC))},
    "cc12m": {"train": ("a dog", str(CRC))},
    "sbu": {"train": ("A dog.", "43_b0.jpg")},
    "coco": {
        "train": ("image 1", "COCO_val2014_000000000001.jpg"),
        "val": ("image 3", "COCO_val2014_000000000003.jpg"),
        "test": ("image 0", "COCO_val2014_000000000000.jpg"),
    },
    "visual_genome": {"train": ("a dog|green grass", "1")},
}
MALFORMED = [
    ("hvu", {"HVU_Val_V1.0.csv": HVU.replace("1.5", "x")}, "Val_V1.0.csv:2: field 'time_start' mu"),
    ("lsmdc", {"LSMDC16_annos_val.csv": "a\tb\n"}, "LSMDC16_annos_val.csv:1: must have 6 fields"),
    ("cc12m", {"cc12m.tsv": "x\ty\tz\n"}, "cc12m.tsv:1: must have 2 fields"),
    ("webvid_2m", {"results_2M_val.csv": "videoid,name\n"}, "val.csv:1: column 'page_dir' is mis"),
    (
        "sbu",
        {"sbu-captions-all.json": {"image_urls": ["x"], "captions": []}},
        "1 image_urls but 0 captions",
    ),
    ("coco", {"dataset_coco.json": {"images": [{}]}}, r"images\[0\]: field 'split' is missing"),
    ("visual_genome", {"region_descriptions.json": [{"id": 1}]}, r"\[0\]: field 'regions' is mis"),
    (
        "ssv2_label",
        {"ssv2_ret_label_train.json": [{"caption": "a"}]},
        r"\[0\]: no field for the media",
    ),
]


@pytest.mark.parametrize("name", list(STORED))
def test_published_files_are_read(manual_dir, read_back, name):
    splits = read_back(name, manual_dir(FILES[name], MEDIA[name]))
    for split, (captions, match_id) in STORED[name].items():
        first = splits[split][0]
        assert "|".join(first.captions) == captions and first.match_id == match_id
        assert first.media_type == ("video" if "videos" in MEDIA[name][0] else "image")


@pytest.mark.parametrize(("name", "changed", "message"), MALFORMED)
def test_malformed_entries_are_named(tmp_path, manual_dir, name, changed, message):
    folder = manual_dir(FILES[name] | changed, MEDIA[name])
    with pytest.raises(ValueError, match=message):
        prepare(name, tmp_path / "data", manual_dir=folder, allow_other_counts=True)


def test_coco_restval_is_training(manual_dir, read_back):
    splits = read_back("coco", manual_dir(FILES["coco"], MEDIA["coco"]))
    assert [example.captions for example in splits["train"]] == [["image 1"], ["image 2"]]
    assert len(splits["val"]) == len(splits["test"]) == 1


def test_hvu_tags_are_labels(manual_dir, read_back):
    [example] = read_back("hvu", manual_dir(FILES["hvu"], MEDIA["hvu"]))["val"]
    assert example.labels == ["dog", "grass"]


def test_rows_that_repeat_another_are_left_out(manual_dir, read_back, capfd):
    table = WEBVID + WEBVID.splitlines(keepends=True)[1]
    files = FILES["webvid_2m"] | {"results_2M_train.csv": table}
    splits = read_back("webvid_2m", manual_dir(files, MEDIA["webvid_2m"]))
    assert len(splits["train"]) == 1
    assert "webvid_2m: left out 1 repeated annotations" in capfd.readouterr().err


def test_clips_of_one_template_match_each_other(manual_dir, read_back):
    name = "ssv2_template"
    first, second = read_back(name, manual_dir(FILES[name], MEDIA[name]))["val"]
    assert first.match_id == second.match_id and first.source == second.source
