"""Media encoded again: they last as long, show the same, and are cheap to sample from."""

import dataclasses
import io

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines.media import decode, images
from data_pipelines.media.reencode import Reencode, even_size, reencode
from data_pipelines.media.video_writer import encode_for_sampling, encode_video
from data_pipelines.storage import prepare as prepare_module
from data_pipelines.storage.prepare import parse_args, prepare
from data_pipelines.storage.stored import read_form

EVEN = list(range(0, 6400, 40))
UNEVEN = [0, 100, 130, 500, 510, 900, 1700, 1740, 2600, 2640]
SETTING = Reencode(short_side=16, fps=8, key_frames=4)


@pytest.fixture
def clips(write_clip):
    return {
        "even": write_clip(EVEN, gop=250),
        "late": write_clip([5000 + t for t in EVEN]),
        "matroska": write_clip(EVEN, "matroska"),
        "uneven": write_clip(UNEVEN, bf=0),
        "program stream": write_clip(EVEN, "mpeg", "mpeg2video"),
    }


def packets(media: bytes) -> list[av.Packet]:
    with av.open(io.BytesIO(media)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def image_file(size, kind, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", ["even", "late", "matroska", "uneven", "program stream"])
@pytest.mark.parametrize("key_frames", [1, 5])
def test_all_frames_are_shown_when_they_were(clips, read_numbers, name, key_frames):
    stored = reencode(clips[name], "video", Reencode(key_frames=key_frames))
    before = decode.probe(clips[name]).duration_secs
    after = decode.probe(stored).duration_secs
    assert after == pytest.approx(before, abs=1e-4)
    seconds = np.random.default_rng(0).uniform(0, before, 40)
    shown = read_numbers(decode.decode_frames(clips[name], seconds))
    assert len(set(shown)) > 4 and read_numbers(decode.decode_frames(stored, seconds)) == shown


@pytest.mark.parametrize("fps", [3, 8, 7.5, 24000 / 1001])
def test_at_a_lower_rate_the_frames_of_the_grid_are_shown(clips, read_numbers, fps):
    clip = clips["even"]
    stored = reencode(clip, "video", Reencode(fps=fps))
    info = decode.probe(stored)
    assert info.duration_secs == pytest.approx(decode.probe(clip).duration_secs, abs=1e-4)
    assert info.num_frames == np.ceil(6.4 * fps - 1e-3)
    patch_ids = np.random.default_rng(0).permutation(info.num_frames)
    shown = read_numbers(decode.decode_frames(stored, (patch_ids + 0.5) / fps))
    expected = read_numbers(decode.decode_frames(clip, patch_ids / fps))
    assert shown == expected and len(set(shown)) == info.num_frames


def test_no_frames_are_made_up(write_clip, read_numbers):
    clip = write_clip(range(0, 3000, 500))
    stored = reencode(clip, "video", Reencode(fps=8))
    assert decode.probe(stored).num_frames == 6
    assert read_numbers(decode.decode_frames(stored, np.arange(6) / 2)) == list(range(6))


@pytest.mark.parametrize("key_frames", [1, 4, 7])
def test_key_frames_are_where_they_should_be_and_nothing_is_reordered(key_frames):
    """Noise: every frame is a change of scene, at which x264 would put key frames of its own."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 32, 64, 3), dtype=np.uint8)
    stored = reencode(encode_video(noise, 10), "video", Reencode(fps=9, key_frames=key_frames))
    found = packets(stored)
    assert [p.is_keyframe for p in found] == [i % key_frames == 0 for i in range(27)]
    assert all(packet.pts == packet.dts for packet in found)


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (36, 46), (20, 90)])
@pytest.mark.parametrize("short_side", [None, 16, 32, 256])
def test_short_side_is_as_asked_and_the_aspect_is_kept(size, short_side):
    clip = encode_video(np.zeros((4, *size, 3), np.uint8), 8)
    stored = reencode(clip, "video", Reencode(short_side=short_side))
    height, width = decode.decode_frames(stored, [0]).shape[1:3]
    assert min(height, width) == min(short_side or 256, *size)
    assert height % 2 == width % 2 == 0
    assert abs(width - height * size[1] / size[0]) <= 1 + size[1] / size[0]


@pytest.mark.parametrize("size", [(33, 65), (17, 16), (145, 99), (1, 9)])
def test_odd_sizes_become_even_and_no_larger(size):
    sides = even_size(*size, None)
    assert all(side % 2 == 0 and side <= max(2, own) for side, own in zip(sides, size, strict=True))


def test_content_and_colors_survive_resizing(clips, read_numbers, numbered_frames):
    stored = reencode(clips["even"], "video", SETTING)
    frames = decode.decode_frames(stored, [0, 1, 2.5, 6.3])
    assert frames.shape == (4, 16, 32, 3)
    assert read_numbers(frames.repeat(2, axis=1).repeat(2, axis=2)) == [0, 25, 62, 156]

    colors = np.array([(225, 30, 35), (30, 170, 55), (45, 75, 240), (250, 250, 250)], np.uint8)
    clip = encode_video(np.broadcast_to(colors[:, None, None], (4, 32, 64, 3)), 4)
    stored = reencode(clip, "video", dataclasses.replace(SETTING, fps=None))
    frames = decode.decode_frames(stored, np.arange(4) / 4)
    np.testing.assert_allclose(frames[:, 8, 16], colors, atol=8)


def test_other_formats_become_mp4(small_media):
    stored = reencode(small_media[".gif"], "video", Reencode(short_side=16))
    colors = decode.decode_frames(stored, [0, 0.1, 0.2]).mean(axis=(1, 2)).argmax(axis=1)
    assert colors.tolist() == [0, 1, 2] and b"ftyp" in stored[:16]


def test_few_frames_are_read_to_sample_one(clips, monkeypatch):
    """Against the same clip as it was, whose only key frame is the first."""
    reads = []
    read = decode.Clip._read
    monkeypatch.setattr(decode.Clip, "_read", lambda clip: reads.append(1) or read(clip))
    counts = {}
    stored = reencode(clips["even"], "video", Reencode(key_frames=4))
    for name, media in (("as it was", clips["even"]), ("stored", stored)):
        reads.clear()
        decode.decode_frames(media, [0.75, 3.2, 5.95])
        counts[name] = len(reads)
    assert counts["as it was"] > 95 and counts["stored"] <= 3 * (4 + 1) + 2


def test_same_input_gives_the_same_bytes_and_none_is_untouched(clips):
    clip = clips["even"]
    assert reencode(clip, "video", SETTING) == reencode(clip, "video", SETTING) != clip
    assert reencode(clip, "video", None) is clip


@pytest.mark.parametrize(("kind", "size"), [("JPEG", (90, 60)), ("PNG", (60, 90)), ("GIF", (9, 8))])
def test_images_are_only_made_smaller(kind, size):
    media = image_file(size, kind)
    stored = reencode(media, "image", Reencode(short_side=20, fps=8))
    with Image.open(io.BytesIO(stored)) as image:
        expected = {(90, 60): (30, 20), (60, 90): (20, 30), (9, 8): (9, 8)}[size]
        assert (image.size, image.format) == (expected, kind)
    assert reencode(media, "image", Reencode(fps=8)) is media


def test_turned_images_stay_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    stored = reencode(image_file((90, 60), "JPEG", exif=exif), "image", Reencode(short_side=20))
    assert images.decode_image(stored).shape == (30, 20, 3)


def test_truncated_clips_are_refused(write_clip):
    whole = write_clip(EVEN, "matroska", gop=250)
    for setting in (SETTING, Reencode()):
        with pytest.raises(decode.DecodeError, match="truncated"):
            reencode(whole[: len(whole) // 2], "video", setting)


def test_encoding_refuses_what_is_no_clip():
    with pytest.raises(ValueError, match="at least one frame"):
        encode_for_sampling([], 1.0, fps=8, gop=4)
    with pytest.raises(ValueError, match="even height and width, not 15 x 16"):
        encode_for_sampling([(0.0, np.zeros((15, 16, 3), np.uint8))], 1.0, fps=8, gop=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"short_side": 255}, "short_side must be even and at least 16, not 255"),
        ({"short_side": 8}, "short_side must be even and at least 16, not 8"),
        ({"fps": 0}, "fps must be positive, not 0"),
        ({"fps": float("nan")}, "fps must be positive, not nan"),
        ({"key_frames": 0}, "key_frames must be at least 1, not 0"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Reencode(**fields)


@pytest.fixture
def folder(manual_dir, write_clip):
    entries = [{"question": "what runs?", "answer": "dog", "video_id": i} for i in (1, 2)]
    folder = manual_dir({f"{split}_qa.json": entries for split in ("train", "val", "test")})
    (folder / "videos").mkdir()
    for number in (1, 2):
        (folder / "videos" / f"video{number}.mp4").write_bytes(write_clip(EVEN[: 50 * number]))
    return folder


def test_the_form_is_stored_and_another_one_is_refused(tmp_path, folder, read_folder, capsys):
    options = {"manual_dir": folder, "allow_other_counts": True}
    found = prepare("msrvtt_qa", tmp_path, reencode=SETTING, **options)
    assert read_form(found) == SETTING
    for example in read_folder(found)["test"]:
        clip = folder / "videos" / f"{example.match_id}.mp4"
        assert example.media == reencode(clip.read_bytes(), "video", SETTING)
    assert prepare("msrvtt_qa", tmp_path, **options) == found  # takes what is there
    assert prepare("msrvtt_qa", tmp_path, reencode=SETTING, **options) == found
    with pytest.raises(
        ValueError,
        match=r"msrvtt_qa: .*1\.0\.0 holds media encoded again \(short side 16, 8 frames per "
        r"second, a key frame every 4\), not .* all frames, a key frame every 8\); give another",
    ):
        prepare("msrvtt_qa", tmp_path, reencode=Reencode(short_side=16), **options)


def test_media_stored_as_they_were_say_so(tmp_path, folder, read_folder):
    options = {"manual_dir": folder, "allow_other_counts": True}
    found = prepare("msrvtt_qa", tmp_path, **options)
    assert read_form(found) is None
    [first, _] = read_folder(found)["test"]
    assert first.media == (folder / "videos" / "video1.mp4").read_bytes()
    with pytest.raises(ValueError, match="holds media as they were, not encoded again"):
        prepare("msrvtt_qa", tmp_path, reencode=SETTING, **options)


@pytest.mark.e2e
def test_workers_encode_the_same(tmp_path, folder, read_folder):
    options = {"manual_dir": folder, "allow_other_counts": True, "reencode": SETTING}
    plain = prepare("msrvtt_qa", tmp_path / "plain", **options)
    shared = prepare("msrvtt_qa", tmp_path / "shared", workers=2, **options)
    assert read_folder(shared) == read_folder(plain) and read_form(shared) == SETTING


def test_every_builder_takes_a_setting(tmp_path):
    options = {"num_train": 4, "num_val": 2, "num_test": 2}
    found = prepare("shapes", tmp_path, reencode=Reencode(short_side=32), **options)
    assert read_form(found) == Reencode(short_side=32)


def test_command_line(capsys, monkeypatch):
    words = ["msrvtt_qa", "--manual-dir=m"]
    assert "reencode" not in parse_args(words)[1]
    _, options = parse_args([*words, "--short-side=256", "--fps=8", "--key-frames=4"])
    assert options["reencode"] == Reencode(256, 8, 4)
    assert parse_args(["shapes", "--fps=8"])[1]["reencode"] == Reencode(fps=8)
    with pytest.raises(SystemExit):
        parse_args(["shapes", "--short-side=255"])
    assert "short_side must be even" in capsys.readouterr().err
    assert set(prepare_module._FORM_FLAGS) == {f.name for f in dataclasses.fields(Reencode)}
