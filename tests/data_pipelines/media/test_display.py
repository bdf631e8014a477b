"""Frames come as players show them: turned, mirrored, and with square pixels."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from data_pipelines.media import decode
from data_pipelines.media.display import Display, display_of, to_rgb
from data_pipelines.media.reencode import Reencode, reencode

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
CORNERS = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)
can_turn = pytest.mark.skipif(
    not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV cannot write a matrix"
)


def corner_clip(turned: bool = True, **shown) -> bytes:
    """64 x 32 pixels in four colors."""
    picture = CORNERS.repeat(16, axis=0).repeat(32, axis=1)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv444p"
        if "aspect" in shown:
            stream.codec_context.sample_aspect_ratio = shown["aspect"]
        if "degrees" in shown:
            stream.set_display_rotation(shown["degrees"], hflip=shown.get("hflip", False))
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def corners(frame: np.ndarray) -> np.ndarray:
    """The colors of the four corners, as 0 or 255."""
    height, width = frame.shape[:2]
    return np.where(frame[[[4], [height - 5]], [4, width - 5]] > 127, 255, 0).astype(np.uint8)


@can_turn
@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270, 87])
def test_turned_and_mirrored_frames_stand_upright(degrees, hflip):
    """The matrix turns counterclockwise and mirrors after it; here np.rot90 is the oracle."""
    clip = corner_clip(degrees=degrees, hflip=hflip)
    shown = np.rot90(CORNERS, round(degrees / 90))
    shown = shown[:, ::-1] if hflip else shown
    [frame] = decode.decode_frames(clip, [0.1])
    assert frame.shape[:2] == ((64, 32) if degrees % 180 in (90, 87) else (32, 64))
    np.testing.assert_array_equal(corners(frame), shown)
    stored = reencode(clip, "video", Reencode(short_side=16))
    [again] = decode.decode_frames(stored, [0.1])
    assert again.shape[:2] == ((32, 16) if degrees % 180 in (90, 87) else (16, 32))
    np.testing.assert_array_equal(corners(again), shown)


@pytest.mark.parametrize(
    ("aspect", "size"),
    [((4, 3), (32, 85)), ((3, 4), (43, 64)), ((1, 1), (32, 64)), ((1, 1000), (32, 64))],
)
def test_pixels_become_square(aspect, size):
    clip = corner_clip(aspect=Fraction(*aspect))
    [frame] = decode.decode_frames(clip, [0.1])
    assert frame.shape[:2] == size
    np.testing.assert_array_equal(corners(frame), CORNERS)
    stored = reencode(clip, "video", Reencode())
    assert decode.decode_frames(stored, [0.1]).shape[1:3] == tuple(side // 2 * 2 for side in size)


@can_turn
def test_oblong_pixels_are_made_square_before_they_are_turned():
    clip = corner_clip(aspect=Fraction(2), degrees=90)
    assert decode.decode_frames(clip, [0.1]).shape[1:3] == (128, 32)


def test_frames_as_they_are_stored_stay_untouched(write_clip):
    with av.open(io.BytesIO(write_clip(range(0, 400, 40)))) as container:
        frame = next(container.decode(video=0))
        display = display_of(frame, None)
        assert display == Display(32, 64)
        expected = frame.to_ndarray(format="rgb24")
        np.testing.assert_array_equal(to_rgb(frame, display, VideoReformatter()), expected)


def test_frames_of_too_many_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(decode, "_MAX_PIXELS", 32 * 64 - 1)
    with pytest.raises(decode.DecodeError, match="a video of too many pixels"):
        decode.check_media(corner_clip(), "video")
