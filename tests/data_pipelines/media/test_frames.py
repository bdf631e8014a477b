"""Clips as JPEG pictures: the same frames as the H.264 form, read and decoded one by one."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from data_pipelines.media import decode, frames
from data_pipelines.media.decode import DecodeError
from data_pipelines.media.reencode import Reencode, reencode
from data_pipelines.media.video_writer import encode_video
from data_pipelines.schema.checks import UserError

FORM = Reencode(store="frames")
EVEN = list(range(0, 6400, 40))
UNEVEN = [0, 100, 130, 500, 510, 900, 1700, 1740, 2600, 2640]


def psnr(some, others) -> float:
    """Peak signal-to-noise ratio in dB."""
    return 10 * np.log10(255**2 / max(1e-9, np.mean((np.asarray(some, float) - others) ** 2)))


@pytest.fixture
def clips(write_clip):
    return {
        "even": write_clip(EVEN, gop=250),
        "late": write_clip([5000 + t for t in EVEN]),
        "uneven": write_clip(UNEVEN, bf=0),
    }


@pytest.mark.parametrize("name", ["even", "late", "uneven"])
@pytest.mark.parametrize("fps", [None, 8, 24000 / 1001])
def test_both_forms_show_the_same_frame_at_every_time(clips, read_numbers, name, fps):
    forms = [Reencode(fps=fps, store=store) for store in ("video", "frames")]
    video, pictures = (reencode(clips[name], "video", form) for form in forms)
    clip = frames.whole_clip(pictures)
    duration = decode.probe(video).duration_secs
    assert clip.duration_secs == duration  # exactly: random times are drawn in parts of it
    # At ticks, too, where rounding decides.
    times = np.random.default_rng(0).uniform(0, duration, 60)
    edges = [0, duration, duration + 1, -1]
    times = np.concatenate([times, np.arange(int(duration * 8)) / 8, edges])
    shown = read_numbers(np.stack(clip.frames(times)))
    assert shown == read_numbers(decode.decode_frames(video, times)) and len(set(shown)) > 4


def photo_clip(num_frames=8, size=(96, 128)) -> bytes:
    """A pan over smooth noise with grain, as H.264."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    scene = np.asarray(coarse.resize((size[1] + 8 * num_frames, size[0]), Image.BICUBIC), int)
    grain = rng.integers(-6, 7, (*scene.shape[:2], 1))
    scene = np.clip(scene + grain, 0, 255).astype(np.uint8)
    views = [scene[:, 8 * i : 8 * i + size[1]] for i in range(num_frames)]
    return encode_video(np.ascontiguousarray(np.stack(views)), 8, crf=10)


def test_compression_costs_no_more_than_that_of_h264():
    clip = photo_clip()
    times = np.arange(8) / 8
    original = decode.decode_frames(clip, times)
    video = decode.decode_frames(reencode(clip, "video", Reencode()), times)
    found = {}
    for quality in (50, 90):
        form = dataclasses.replace(FORM, quality=quality)
        pictures = frames.whole_clip(reencode(clip, "video", form)).frames(times)
        found[quality] = psnr(pictures, original)
    assert found[90] > 36 and found[90] > psnr(video, original) - 2
    assert found[90] > found[50] + 2  # the setting counts


def test_only_pictures_that_are_shown_are_read(clips):
    media = reencode(clips["even"], "video", FORM)
    head, pictures = frames.split(media, 0)
    reads = []

    def read(start, count):
        reads.append(count)
        return pictures[start : start + count]

    clip = frames.FrameClip(head, read)
    shown = clip.frames([0.75, 3.2, 5.95])
    assert len(reads) == 3 and sum(reads) < len(pictures) / 30
    np.testing.assert_array_equal(shown, frames.whole_clip(media).frames([0.75, 3.2, 5.95]))


@pytest.mark.parametrize(("reduction", "size"), [(1, (96, 128)), (2, (48, 64)), (8, (12, 16))])
def test_pictures_are_decoded_at_a_fraction_of_their_size(reduction, size):
    clip = frames.whole_clip(reencode(photo_clip(), "video", FORM))
    whole, reduced = clip.frames([0.5])[0], clip.frames([0.5], reduction)[0]
    assert reduced.shape == (*size, 3)
    means = whole.reshape(size[0], reduction, size[1], reduction, 3).mean(axis=(1, 3))
    assert psnr(reduced, means) > 35


def test_pictures_become_smaller_and_keep_their_aspect(clips):
    form = dataclasses.replace(FORM, short_side=16)
    clip = frames.whole_clip(reencode(clips["even"], "video", form))
    assert clip.size == (16, 32) == clip.frames([0])[0].shape[:2]


def test_same_input_gives_the_same_bytes(clips):
    assert reencode(clips["even"], "video", FORM) == reencode(clips["even"], "video", FORM)


def test_damage_is_noticed(clips):
    media = reencode(clips["uneven"], "video", FORM)
    flipped = bytearray(media)
    flipped[-20] ^= 1  # in the last picture, which is decoded all the same
    clip = frames.whole_clip(bytes(flipped))
    clip.frames([0.0])
    with pytest.raises(DecodeError, match="damaged record: picture 9 has another checksum"):
        clip.frames([9.0])
    with pytest.raises(DecodeError, match="damaged record: picture 9"):
        frames.whole_clip(media[:-20]).frames([9.0])
    for broken in (b"", media[:20], media[:60], b"x" + media[1:]):
        with pytest.raises(DecodeError, match="not a readable clip of pictures"):
            frames.whole_clip(broken)


def test_a_clip_without_frames_is_refused():
    with pytest.raises(ValueError, match="at least one frame"):
        frames.encode_frames([], 1.0, 90)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"store": "jpeg"}, "store must be one of video, frames, not 'jpeg'"),
        ({"quality": 0}, "quality must be 1 to 100, not 0"),
        ({"quality": 101}, "quality must be 1 to 100, not 101"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(UserError, match=message):
        Reencode(**fields)
