"""EmojiVid on tiny archives of the real layout: joins, families, splits, pictures, the build."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines.schema.config import SourceConfig
from data_pipelines.storage.build import build
from data_pipelines.storage.builders import emojivid, webp
from data_pipelines.storage.builders.emojibase import captions, code_key, load_emoji, questions
from data_pipelines.storage.builders.emojivid import EmojiVid, Media, make_splits, split_families
from data_pipelines.storage.stored import open_source, read_info

GROUPS = {
    "groups": {"0": "smileys-emotion", "1": "people-body", "5": "travel-places"},
    "subgroups": {"0": "face-smiling", "27": "person-activity", "58": "time"},
}
RED, GREEN, BLUE = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)
NUM_FACES = 24


def entry(code: str, label: str, group: int, subgroup: int, tags=(), **more) -> dict:
    fields = {"hexcode": code, "label": label, "group": group, "subgroup": subgroup}
    return {**fields, "tags": list(tags), **more}


def with_tones(item: dict, sign: str = "") -> dict:
    """`item` with a variant for the first two skin tones, as emojibase nests them."""
    base, *rest = item["hexcode"].split("-")
    skins = [
        {
            "hexcode": "-".join([base, tone, *rest]),
            "label": f"{item['label']}: {name} skin tone",
            "tone": number,
        }
        for number, (tone, name) in enumerate([("1F3FB", "light"), ("1F3FC", "medium-light")], 1)
    ]
    return {**item, "skins": skins}


def table() -> list[dict]:
    """24 faces, runners of three person types with tones, a clock, and awkward pairs."""
    faces = [
        entry(f"{0x1F600 + i:X}", f"face {i}", 0, 0, tags=["face", f"tag {i}"])
        for i in range(NUM_FACES)
    ]
    runners = [
        entry("1F3C3", "person running", 1, 27, tags=["fast", "race", "running"]),
        entry("1F3C3-200D-2642-FE0F", "man running", 1, 27, gender=1),
        entry("1F3C3-200D-2640-FE0F", "woman running", 1, 27, gender=0),
    ]
    others = [
        entry("1F550", "one o\u2019clock", 5, 58),
        entry("1F551", "two o\u2019clock", 5, 58),
        entry("0023-FE0F-20E3", "keycap: #", 5, 58),
        entry("1F483", "woman dancing", 1, 27),
        entry("1F57A", "man dancing", 1, 27),
        entry("1F9DC", "merperson", 1, 27),
        entry("1F9DC-200D-2640-FE0F", "mermaid", 1, 27, gender=0),
        entry("1F468-200D-1F3A8", "man artist", 1, 27),
        entry("1F9D1-200D-1F3A8", "artist", 1, 27),
        entry("1F48F", "kiss", 1, 27),
        entry("1F469-200D-2764-FE0F-200D-1F48B-200D-1F469", "kiss: woman, woman", 1, 27),
        entry("1F9D4", "person: beard", 1, 27),
        entry("1F468-200D-1F9B2", "man: bald", 1, 27),
    ]
    return [*faces, *map(with_tones, runners), *others]


def write_tgz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_table(folder: Path) -> Path:
    members = {"package/en/data.json": table(), "package/meta/groups.json": GROUPS}
    encoded = {name: json.dumps(value).encode() for name, value in members.items()}
    return write_tgz(folder / "emojibase-data.tgz", encoded)


def animation(colors, durations_ms=100, size=32) -> bytes:
    frames = [Image.new("RGBA", (size, size), color) for color in colors]
    output = io.BytesIO()
    settings = {"save_all": True, "append_images": frames[1:], "duration": durations_ms}
    frames[0].save(output, "WEBP", lossless=True, **settings)
    return output.getvalue()


def still(color=RED) -> bytes:
    output = io.BytesIO()
    Image.new("RGBA", (8, 8), color).save(output, "PNG")
    return output.getvalue()


def decode_mp4(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return load_emoji(write_table(tmp_path_factory.mktemp("table")))


def media(items, kind: str = "clip") -> list[Media]:
    return [Media(item, kind.encode(), f"{kind} {item.code}") for item in items]


@pytest.mark.parametrize(
    ("file_name", "label"),
    [
        ("1f3c3-200d-2642-fe0f", "man running"),
        ("1f3c3-200d-2642", "man running"),
        ("1F3C3-1F3FB-200D-2640-FE0F", "woman running: light skin tone"),
        ("0023-fe0f-20e3", "keycap: #"),
        ("23-20e3", "keycap: #"),
    ],
)
def test_file_names_join_by_code_points(emoji, file_name, label):
    assert emoji[code_key(file_name)].label == label


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("1f3c3", "1f3c3-1f3fb-200d-2640", True),
        ("1f483", "1f57a", True),  # only the labels say so
        ("1f9dc", "1f9dc-200d-2640", True),  # only the code points say so
        ("1f468-200d-1f3a8", "1f9d1-200d-1f3a8", True),
        ("1f48f", "1f469-200d-2764-200d-1f48b-200d-1f469", True),
        ("1f9d4", "1f468-200d-1f9b2", False),
        ("1f600", "1f601", False),
        ("1f3c3", "1f483", False),
    ],
)
def test_families_merge_variants_and_nothing_else(emoji, first, second, same):
    assert (emoji[first].family == emoji[second].family) == same


def test_captions_start_with_the_label_and_add_only_new_tags(emoji):
    runner = emoji["1f3c3-1f3fb"]
    assert captions(runner, 0) == ("person running: light skin tone",)
    assert captions(runner, 3)[1:] == ("person running: light skin tone, fast, race",)


def test_questions_are_asked_only_where_the_data_answers(emoji):
    answers = {item.kind: item.answer for item in questions(emoji["1f3c3-1f3fc-200d-2642"])}
    assert answers == {
        "skin_tone": "medium-light",
        "person_type": "man",
        "subgroup": "person activity",
        "content": "man running",
    }
    assert {item.kind for item in questions(emoji["1f600"])} == {"subgroup", "content"}
    couple = emoji["1f469-200d-2764-200d-1f48b-200d-1f469"]
    assert "person_type" not in {item.kind for item in questions(couple)}


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)])
    pixels = np.asarray(webp.on_white(image))
    np.testing.assert_array_equal(pixels, [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]])


def test_stills_keep_their_size_and_lose_their_transparency():
    image = Image.open(io.BytesIO(webp.png_on_white(still((0, 0, 0, 0)))))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (8, 8))
    assert np.asarray(image).min() == 255


def test_frames_follow_the_durations_of_the_animation():
    image = Image.open(io.BytesIO(animation([RED, GREEN, BLUE], [100, 400, 290])))
    frames = webp.resample_frames(image, size=16, fps=12)
    assert frames.shape == (9, 16, 16, 3)  # 0.79 s hold 9 whole frames
    ends = np.array([100, 500, 790])
    shown = [int(np.searchsorted(ends, k * 1000 / 12, side="right")) for k in range(9)]
    np.testing.assert_array_equal(frames[:, 0, 0].argmax(-1), shown)


def test_clip_is_h264_of_the_stated_size_and_rate():
    data = webp.clip_from_webp(animation([RED, GREEN], 500))
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 128, 128)
        assert stream.average_rate == 12 and stream.frames == 12
    frames = decode_mp4(data)
    for frame, color in ((frames[2], RED), (frames[-1], GREEN)):
        assert np.abs(frame.mean((0, 1)) - color[:3]).max() < 12


def test_same_input_gives_the_same_bytes():
    data = animation([RED, GREEN, BLUE], 200)
    assert webp.clip_from_webp(data) == webp.clip_from_webp(data)


def test_single_picture_is_no_clip():
    assert webp.clip_from_webp(animation([RED])) is None


def test_unreadable_file_is_named(tmp_path):
    members = {"package/assets/1f600.webp": animation([RED, GREEN])[:60]}
    path = write_tgz(tmp_path / "clips.tgz", members)
    with pytest.raises(ValueError, match=r"clips\.tgz, package/assets/1f600\.webp: "):
        webp.convert_archive(path)


def test_archive_of_another_layout_is_named(tmp_path):
    path = write_tgz(tmp_path / "clips.tgz", {"package/README.md": b""})
    with pytest.raises(ValueError, match=r"clips\.tgz holds no package/assets/\*\.webp"):
        webp.convert_archive(path)


@pytest.mark.parametrize("seed", range(20))
def test_split_sizes_and_fixed_families(seed):
    families = [f"family {i}" for i in range(100)]
    split = split_families(families, always_train={"family 3", "family 4"}, seed=seed)
    sizes = {name: list(split.values()).count(name) for name in ("train", "val", "test")}
    assert sizes == {"train": 60, "val": 10, "test": 30}
    assert split["family 3"] == split["family 4"] == "train"
    assert split == split_families(reversed(families), {"family 4", "family 3"}, seed)
    assert split != split_families(families, {"family 3", "family 4"}, seed + 1)


@pytest.mark.parametrize("missing", range(4))
def test_no_family_crosses_splits_and_no_still_of_a_held_out_family_is_in_protocol_a(
    emoji, missing
):
    """Property, for several sets of clips: every fourth emoji has a still but no clip."""
    in_clips = [item for i, item in enumerate(emoji.values()) if i % 4 != missing]
    splits, report = make_splits(media(in_clips), media(emoji.values(), "still"))
    family = {item.label: item.family for item in emoji.values()}
    families = {name: {family[e.match_id] for e in items} for name, items in splits.items()}
    for first, second in itertools.combinations(("train", "val", "test"), 2):
        assert not families[first] & families[second]
    held_out = {name for name, split in report["families"].items() if split != "train"}
    assert held_out and not families["stills_a"] & held_out
    assert families["stills_b"] == {item.family for item in emoji.values()}
    assert families["stills_a"] == families["stills_b"] - held_out
    for example in (*splits["val"], *splits["test"]):
        assert "skin tone" not in example.match_id and len(example.captions) == 1


def test_clock_faces_are_never_tested(emoji):
    clips = [emoji["1f550"], emoji["1f551"], emoji["1f600"], emoji["1f601"]]
    splits, report = make_splits(media(clips), media(clips, "still"))
    assert {report["families"][item.family] for item in clips[:2]} == {"train"}
    assert len(splits["test"]) == 1


def test_clip_and_still_of_one_emoji_match_but_tones_do_not(emoji):
    shown = [emoji[code] for code in ("1f3c3", "1f3c3-1f3fb", "1f550")]
    splits, _ = make_splits(media(shown), media(shown, "still") + media(shown, "other style"))
    stills = [example.match_id for example in splits["stills_b"]]
    assert len(set(stills)) == 3 and len(stills) == 6
    clips = [e.match_id for name in ("train", "val", "test") for e in splits[name]]
    assert set(clips) <= set(stills)


def test_labels_are_the_frequent_tags(emoji):
    clips = media(emoji[f"{0x1F600 + i:x}"] for i in range(NUM_FACES))
    splits, report = make_splits(clips, clips)
    assert report["num_labels"] == 1
    assert all(example.labels == ("face",) for example in splits["train"])


def write_archives(folder: Path) -> dict[str, Path]:
    """The seven archives, with one unmatched, one repeated and one single-picture file."""
    codes = [item["hexcode"].lower() for item in table()]
    clips = {code: animation([RED, GREEN, BLUE], 200) for code in codes}
    clips |= {"1f3c3-1f3fb": animation([GREEN, BLUE], 200), "ffff1": animation([RED, GREEN])}
    clips |= {"1f550-fe0f": clips["1f550"], "23-20e3": animation([RED])}
    archives = {emojivid.TABLE: write_table(folder)}
    for part, name in enumerate(emojivid.CLIPS):
        own = {f"package/assets/{code}.webp": clips[code] for code in sorted(clips)[part::4]}
        archives[name] = write_tgz(folder / f"clips-{part}.tgz", own)
    for name, under in emojivid.STILLS.items():
        stills = {f"{under}/{code}.png": still() for code in codes}
        archives[name] = write_tgz(folder / f"{name}.tgz", stills)
    return archives


def test_build_from_archives(tmp_path):
    archives = write_archives(tmp_path)
    builder = EmojiVid(data_dir=tmp_path / "data", archives=archives, num_processes=2)
    folder = build(builder)
    assert folder.parent == tmp_path / "data" / "emojivid"
    report = json.loads((folder / emojivid.REPORT_FILE).read_text())
    num_codes = len(table())
    assert report["num_webp_files"] == num_codes + 4
    assert report["num_single_pictures"] == 1
    assert report["num_clips"] == num_codes + 1
    assert report["num_stills"] == 2 * num_codes
    assert [name.split(":")[1] for name in report["unmatched_clips"]] == ["ffff1.webp"]
    assert len(report["repeated_clips"]) == 1

    splits = read_info(folder).splits
    sources = {
        split: open_source(SourceConfig("emojivid", split), tmp_path / "data") for split in splits
    }
    assert {name: len(source) for name, source in sources.items()} == report["num_examples"]
    assert set(sources) == {"train", "val", "test", "stills_a", "stills_b"}
    record = sources["test"][0]
    assert record["media_type"] == b"video"
    assert np.abs(decode_mp4(record["media"])[0].mean((0, 1)) - RED[:3]).max() < 12
    assert sources["stills_a"][0]["media_type"] == b"image"
