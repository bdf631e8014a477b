import io
import os
import wave

import numpy as np
import pytest
from PIL import Image

from data_pipelines.media import decode, images
from data_pipelines.media.video_writer import encode_video


def shown_at(times_ms, seconds) -> list[int]:
    """The oracle: the last frame whose time (from the first frame's) is at most `seconds`."""
    starts = np.asarray(times_ms) - times_ms[0]
    # Half a millisecond of tolerance, as the container's ticks are finer than ours.
    patch_ids = np.searchsorted(starts, np.asarray(seconds) * 1000 + 0.5, side="right") - 1
    return np.clip(patch_ids, 0, None).tolist()


def png(array, **kwargs) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG", **kwargs)
    return file.getvalue()


@pytest.mark.parametrize("gop", [6, 250])
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_constant_rate_matches_oracle(write_clip, read_numbers, gop, order):
    times_ms = list(range(0, 6400, 100))
    clip = write_clip(times_ms, gop=gop)
    rng = np.random.default_rng(0)
    seconds = np.sort(rng.uniform(0, 6.4, 12))
    seconds = np.append(seconds, [0, 0.1, 0.3, 6.3, 6.4])  # exactly on frames, and the end
    if order == "shuffled":
        rng.shuffle(seconds)
    frames = decode.decode_frames(clip, seconds)
    assert frames.dtype == np.uint8 and frames.shape == (17, 32, 64, 3)
    assert read_numbers(frames) == shown_at(times_ms, seconds)


@pytest.mark.parametrize("start_ms", [0, 5000])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_rate_and_start_time_match_oracle(write_clip, read_numbers, container, start_ms):
    times_ms = [start_ms + t for t in (0, 100, 130, 500, 510, 900, 1700, 1740, 2600, 2640)]
    seconds = [0, 0.05, 0.12, 0.2, 0.505, 0.6, 1.0, 1.72, 1.75, 2.5, 2.62]
    # Reordered frames would make this muxer write too short a duration.
    frames = decode.decode_frames(write_clip(times_ms, container, bf=0), seconds)
    assert read_numbers(frames) == shown_at(times_ms, seconds)


@pytest.mark.parametrize(
    ("container", "codec"), [("mpegts", "libx264"), ("mpeg", "mpeg2video"), ("avi", "mpeg4")]
)
def test_streams_without_index_or_with_late_start(write_clip, read_numbers, container, codec):
    times_ms = list(range(0, 4000, 40))
    clip = write_clip(times_ms, container, codec)
    info = decode.probe(clip)
    # FFmpeg estimates the duration of a program stream.
    assert info.duration_secs == pytest.approx(4, abs=0.6) and info.fps == pytest.approx(25)
    seconds = [0, 0.5, 1.9, 2.95, 3.4]
    # Five milliseconds later: these containers round their time stamps.
    frames = decode.decode_frames(clip, np.add(seconds, 0.005))
    assert read_numbers(frames) == shown_at(times_ms, np.add(seconds, 0.005))


def test_times_are_clamped_into_the_clip(write_clip, read_numbers):
    clip = write_clip(range(0, 1000, 100))
    assert read_numbers(decode.decode_frames(clip, [-3, 99])) == [0, 9]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize(("gop", "most", "least"), [(10, 60, 1), (250, 150, 120)])
def test_seeks_only_over_key_frames(
    write_clip, read_numbers, monkeypatch, container, gop, most, least
):
    clip = write_clip(range(0, 8000, 40), container, gop=gop)
    num_reads = 0
    read = decode.Clip._read

    def counted(self):
        nonlocal num_reads
        num_reads += 1
        return read(self)

    monkeypatch.setattr(decode.Clip, "_read", counted)
    assert read_numbers(decode.decode_frames(clip, [0, 7.98])) == [0, 199]
    assert least <= num_reads <= most


def test_frames_that_nobody_needs_are_not_decoded(write_clip, read_numbers, monkeypatch):
    clip, read, num_reads = write_clip(range(0, 8000, 40), gop=250, bf=3), decode.Clip._read, []
    monkeypatch.setattr(decode.Clip, "_read", lambda self: num_reads.append(1) or read(self))
    assert read_numbers(decode.decode_frames(clip, [7.98])) == [199]
    assert 90 <= len(num_reads) <= 110


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "flv"])
@pytest.mark.parametrize("gop", [5, 250])
@pytest.mark.parametrize("bf", [0, 1, 3])
def test_nothing_is_missing_that_is_asked_for_later(write_clip, read_numbers, container, gop, bf):
    """In the same open clip, of which other frames were left out before."""
    times_ms, rng = list(range(0, 4000, 40)), np.random.default_rng(0)
    with decode.open_clip(write_clip(times_ms, container, gop=gop, bf=bf)) as clip:
        for _ in range(5):
            seconds = rng.choice(times_ms, rng.integers(1, 5)) / 1000 + rng.choice([0.0, 0.01])
            assert read_numbers(clip.frames(seconds)) == shown_at(times_ms, seconds)


def test_going_back_in_an_open_clip(write_clip, read_numbers):
    with decode.open_clip(write_clip(range(0, 4000, 40))) as clip:
        numbers = [read_numbers(clip.frames([t]))[0] for t in (3.01, 0.01, 2.01, 1.01)]
    assert numbers == [75, 0, 50, 25]


def test_paths_are_read_and_closed(tmp_path, write_clip):
    path = tmp_path / "clip.mp4"
    path.write_bytes(write_clip(range(0, 1000, 100)))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    before = len(os.listdir("/proc/self/fd"))
    assert decode.decode_frames(path, [0.5]).shape == (1, 32, 64, 3)
    with pytest.raises(decode.DecodeError, match="not a readable video"):
        decode.probe(broken)
    assert len(os.listdir("/proc/self/fd")) == before


def test_probe_reads_the_header(write_clip):
    info = decode.probe(write_clip(range(0, 4000, 40)))
    assert info.duration_secs == pytest.approx(4, abs=0.05)
    assert info.fps == pytest.approx(25, abs=0.5) and info.num_frames == 100


def cut(clip: bytes, share: float) -> bytes:
    """All headers, but only a share of the frames' data."""
    start = clip.index(b"mdat")
    return clip[: start + int(share * (len(clip) - start))]


@pytest.mark.parametrize("share", [0.4, 0.7, 0.85])
def test_truncated_files_raise(write_clip, share):
    whole = write_clip(range(0, 4000, 40), movflags="faststart")
    decode.check_media(whole, "video")
    with pytest.raises(decode.DecodeError, match="truncated"):
        decode.check_media(cut(whole, share), "video")
    index_last = write_clip(range(0, 4000, 40))
    with pytest.raises(decode.DecodeError, match="not a readable video"):
        decode.check_media(index_last[: int(len(index_last) * share * 0.5)], "video")


def test_a_stream_that_ends_between_packets_is_truncated(write_clip):
    """Matroska packets carry their sizes, so a cut file just ends early, without an error."""
    whole = write_clip(range(0, 4000, 40), "matroska", gop=250)
    decode.check_media(whole, "video")
    with pytest.raises(decode.DecodeError, match=r"truncated: frames end at .* of 4\.0. s"):
        decode.check_media(whole[: len(whole) // 2], "video")


def test_sound_is_not_a_video():
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with pytest.raises(decode.DecodeError, match="without a video stream"):
        decode.check_media(file.getvalue(), "video")


@pytest.mark.parametrize("media", [b"", b"plain text", b"\x00" * 1000])
@pytest.mark.parametrize("media_type", ["video", "image"])
def test_other_bytes_raise(media, media_type):
    with pytest.raises(decode.DecodeError, match=f"not a readable {media_type}"):
        decode.check_media(media, media_type)


def test_missing_file_raises(tmp_path):
    with pytest.raises(decode.DecodeError, match="No such file"):
        decode.decode_frames(tmp_path / "none.mp4", [0])


def test_wrong_media_types_raise(write_clip, numbered_frames):
    image = png(numbered_frames(1)[0])
    clip = write_clip(range(0, 1000, 100))
    decode.check_media(image, "image")
    with pytest.raises(decode.DecodeError, match="an image where a video is expected"):
        decode.check_media(image, "video")
    with pytest.raises(decode.DecodeError, match="a video where an image is expected"):
        decode.check_media(clip, "image")
    with pytest.raises(decode.DecodeError, match="a single frame where a video is expected"):
        decode.check_media(write_clip([0]), "video")


def test_transparency_is_put_on_white():
    array = np.zeros((2, 2, 4), np.uint8)
    array[0] = 255, 0, 0, 255
    array[1, 1] = 0, 0, 0, 128
    expected = [[[255, 0, 0], [255, 0, 0]], [[255, 255, 255], [127, 127, 127]]]
    np.testing.assert_allclose(images.decode_image(png(array)), expected, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_say(orientation):
    """The eight orientations, by what NumPy does to a picture stored that way."""
    upright = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(file, format="PNG", exif=exif)
    np.testing.assert_array_equal(decode.decode_image(file.getvalue()), upright)


def test_truncated_image_raises():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with pytest.raises(decode.DecodeError, match="not a readable image"):
        images.decode_image(png(noise)[:1000])


def test_encoding_keeps_colors_and_is_deterministic():
    colors = np.array([(225, 30, 35), (30, 170, 55), (45, 75, 240), (250, 250, 250)], np.uint8)
    frames = np.broadcast_to(colors[:, None, None], (4, 16, 32, 3))
    clip = encode_video(frames, fps=8)
    assert clip == encode_video(frames, fps=8)
    decoded = decode.decode_frames(clip, np.arange(4) / 8)
    np.testing.assert_allclose(decoded, frames, atol=6)


@pytest.mark.parametrize("shape", [(2, 15, 16, 3), (2, 16, 15, 3), (0, 16, 16, 3)])
def test_encoding_refuses_odd_sizes_and_no_frames(shape):
    with pytest.raises(ValueError, match="even height and width"):
        encode_video(np.zeros(shape, np.uint8), fps=8)


@pytest.mark.parametrize("container", ["mp4", "matroska", "flv", "mpegts"])
def test_streams_that_hide_their_reordering_are_read_right(
    write_clip, read_numbers, monkeypatch, container
):
    """Seeking then goes past some frames, or past the last key frame, which must show."""
    times_ms = list(range(0, 4000, 40))
    clip = write_clip(times_ms, container, gop=5)
    monkeypatch.setattr(decode.Clip, "_reorder_ticks", 0)
    seconds = np.random.default_rng(0).permutation(times_ms) / 1000 + 0.005
    with decode.open_clip(clip) as opened:
        shown = [read_numbers(opened.frames([secs]))[0] for secs in seconds]
    assert shown == shown_at(times_ms, seconds)
