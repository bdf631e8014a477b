"""The right stream, its own duration, and no exception but DecodeError."""

import io
import struct

import av
import numpy as np
import pytest

from data_pipelines.media import decode
from data_pipelines.media.sampling import segment_times
from data_pipelines.media.source import Source

TIMES_MS = range(0, 2000, 40)
WITH_SOUND = [
    *[("mp4", "libx264"), ("mov", "libx264"), ("matroska", "libx264"), ("webm", "libvpx")],
    *[("mpegts", "libx264"), ("flv", "libx264"), ("mpeg", "mpeg2video"), ("nut", "libx264")],
]


@pytest.mark.parametrize("sound_secs", [0.0, 0.4, 5.0])
@pytest.mark.parametrize("start_ms", [0, 1000])
@pytest.mark.parametrize(("container", "codec"), WITH_SOUND)
def test_the_duration_is_that_of_the_video(
    write_clip, read_numbers, container, codec, start_ms, sound_secs
):
    times_ms = [start_ms + time for time in TIMES_MS]
    clip = write_clip(times_ms, container, codec, sound_secs=sound_secs)
    decode.check_media(clip, "video")
    duration = decode.probe(clip).duration_secs
    assert duration == pytest.approx(2, abs=0.002)
    assert read_numbers(decode.decode_frames(clip, segment_times(duration, 8))) == [
        int(50 * (i + 0.5) / 8) for i in range(8)
    ]


def test_pieces_of_a_long_recording_begin_where_they_begin(write_clip, read_numbers):
    """`ffmpeg -f segment` leaves the times as they were; the header counts from zero."""
    clip = write_clip(range(40_000, 44_000, 40), "matroska", bf=0)
    with av.open(io.BytesIO(clip)) as container:
        assert container.duration / av.time_base == pytest.approx(44, abs=0.1), "not what is tested"
    decode.check_media(clip, "video")
    assert decode.probe(clip).duration_secs == pytest.approx(4)
    assert read_numbers(decode.decode_frames(clip, [0, 2, 3.99])) == [0, 50, 99]


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("sound_secs", [0.0, 4.0])
def test_a_file_that_was_cut_still_shows(write_clip, cut, sound_secs):
    whole = write_clip(range(0, 4000, 40), "matroska", sound_secs=sound_secs)
    with pytest.raises(decode.DecodeError, match=r"truncated|a single frame"):
        decode.check_media(whole[: int(cut * len(whole))], "video")


def test_live_webm_has_the_duration_of_its_frames(write_clip, read_numbers):
    clip = write_clip(TIMES_MS, "webm", "libvpx", live="1")
    with av.open(io.BytesIO(clip)) as container:
        assert container.duration is None, "not what is tested"
    assert decode.probe(clip).duration_secs == pytest.approx(2)
    assert read_numbers(decode.decode_frames(clip, [0, 1, 1.99])) == [0, 25, 49]


@pytest.mark.parametrize(("codec", "bf"), [("mpeg4", 2), ("mpeg4", 0), ("libx264", 3)])
@pytest.mark.parametrize("order", [1, -1])
def test_avi_frames_are_counted(write_clip, read_numbers, codec, bf, order):
    """AVI has no times of presentation; those that FFmpeg guesses are up to three frames off."""
    clip = write_clip(range(0, 4000, 40), "avi", codec, bf=bf)
    with decode.open_clip(clip) as opened:
        for _ in range(2):
            places = [0, 1, 2, 3, 4, 33, 34, 35, 97, 98, 99][::order]
            assert read_numbers(opened.frames([(i + 0.5) / 25 for i in places])) == places
        single = [read_numbers(opened.frames([(i + 0.5) / 25]))[0] for i in (70, 10, 90, 40)]
        assert single == [70, 10, 90, 40]


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
def test_program_streams_are_exact_in_any_order(write_clip, read_numbers, codec):
    clip = write_clip(range(0, 4000, 40), "mpeg", codec)
    rng = np.random.default_rng(0)
    with decode.open_clip(clip) as opened:
        for _ in range(8):
            places = rng.integers(0, 100, 3).tolist()
            assert read_numbers(opened.frames([(i + 0.5) / 25 for i in places])) == places


def test_the_marked_stream_is_the_video(write_clip, read_numbers):
    """A preview that comes first is not what players show."""
    file = io.BytesIO()
    preview, clip = write_clip(range(0, 800, 40)), write_clip(TIMES_MS)
    with av.open(file, "w", format="matroska") as out:
        inputs = [av.open(io.BytesIO(media)) for media in (preview, clip)]
        streams = [out.add_stream_from_template(source.streams.video[0]) for source in inputs]
        streams[0].disposition = av.stream.Disposition(0)
        streams[1].disposition = av.stream.Disposition.default
        for source, stream in zip(inputs, streams, strict=True):
            for packet in source.demux():
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
            source.close()
    assert decode.probe(file.getvalue()).duration_secs == pytest.approx(2, abs=0.05)
    assert read_numbers(decode.decode_frames(file.getvalue(), [1.9])) == [47]


def test_sound_with_a_cover_says_so(numbered_frames, small_media):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        sound = out.add_stream("aac", rate=8000, layout="mono")
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(numbered_frames(1)[0], format="rgb24")
        out.mux(cover.encode(picture) + cover.encode())
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        wave.sample_rate = 8000
        out.mux(sound.encode(wave) + sound.encode())
    with pytest.raises(decode.DecodeError, match="without a video stream: a cover picture"):
        decode.check_media(file.getvalue(), "video")


@pytest.mark.parametrize(
    ("container", "known", "unknown"),
    [("mp4", b"avc1", b"braw"), ("matroska", b"V_MPEG4/ISO/AVC", b"V_UNKNOWN/CODEC")],
)
def test_unknown_codecs_are_refused(write_clip, container, known, unknown):
    clip = write_clip(TIMES_MS, container)
    assert known in clip
    with pytest.raises(decode.DecodeError, match="of a codec without a decoder"):
        decode.check_media(clip.replace(known, unknown), "video")


def test_streams_that_appear_while_reading_do_no_harm(write_clip, read_numbers):
    """PyAV may end with an IndexError at the end of such a file."""
    clip = bytearray(write_clip(TIMES_MS, "mpegts", sound_secs=2.0))
    packets = np.frombuffer(clip, np.uint8).reshape(-1, 188)
    ids = (packets[:, 1] & 0x1F).astype(int) << 8 | packets[:, 2]
    with av.open(io.BytesIO(clip)) as container:
        sound = container.streams.audio[0].id
    late = np.flatnonzero(ids == sound)[-8:]  # the end of the sound, under an id of its own
    for place in late:
        struct.pack_into(">H", clip, place * 188 + 1, 0x4000 | 0x1F0)
    frames = decode.decode_frames(bytes(clip), [0.1, 1.9])
    assert read_numbers(frames) == [2, 47]


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "flv", "mpegts", "mpeg"])
def test_rewinding_comes_back_to_the_first_packet(write_clip, container):
    codec = {"avi": "mpeg4", "mpeg": "mpeg2video"}.get(container, "libx264")
    source = Source(write_clip(TIMES_MS, container, codec))
    first = [packet.dts for _, packet in zip(range(4), source.packets(), strict=False)]
    source.rewind()
    assert [packet.dts for _, packet in zip(range(4), source.packets(), strict=False)] == first
    source.close()


@pytest.mark.parametrize(
    "name", ["12:30:05.mp4", "data:x.mp4", "http:a.mp4", "a%03d.mp4", "a b,c.mp4"]
)
def test_any_name_is_a_file(write_clip, tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(write_clip(TIMES_MS))
    monkeypatch.chdir(tmp_path)
    for path in (name, f"./{name}", tmp_path / name):
        assert decode.probe(path).num_frames == 50
