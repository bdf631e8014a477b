"""Frames to H.264 files: for clips that we make ourselves, and for clips stored in another form."""

import contextlib
import ctypes
import io
import itertools
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

CRF = 18  # x264's quality, 0 (lossless) to 51; its own default is 23
SAMPLING_CRF = 20
TICKS_PER_SEC = 90_000  # whole for all common frame rates and for milliseconds
TICK_TOLERANCE = 1e-3
_M_PERTURB = -6  # of glibc's mallopt


def encode_video(
    frames: UInt8[np.ndarray, "t h w 3"], fps: float, *, gop: int = 12, crf: int = CRF
) -> bytes:
    """Encode RGB frames as an MP4 file with one H.264 stream; equal input gives equal bytes (ours).

    Args:
      frames: height and width must be even, because color is stored at half resolution.
      fps: frames per second, constant.
      gop: frames from one key frame to the next, at most.
      crf: x264's quality, 0 (lossless) to 51.

    Raises:
      ValueError: no frames, or an odd height or width.
    """
    if len(frames) == 0:
        raise ValueError(f"H.264 needs frames of even height and width, not {frames.shape}")
    file = io.BytesIO()
    reformatter = VideoReformatter()
    with _cleared_memory(), av.open(file, "w", format="mp4") as container:
        stream = _add_stream(container, frames.shape[1:], fps, gop, {"crf": str(crf)})
        for frame in frames:
            container.mux(stream.encode(_to_yuv(frame, reformatter)))
        container.mux(stream.encode())
    return file.getvalue()


def encode_for_sampling(
    frames: Iterable[tuple[float, UInt8[np.ndarray, "h w 3"]]],
    duration_secs: float,
    *,
    fps: float,
    gop: int,
) -> bytes:
    """Encode an MP4 file with single frames quick to read; equal input gives equal bytes (ours).

    There are no B-frames, and every `gop`-th frame is a key frame, wherever the scenes change. So
    a reader decodes at most `gop` frames to show one, none of which comes after it; and x264 leaves
    out what takes long to decode (CABAC, deblocking).

    Args:
      frames: (seconds, RGB frame of even height and width), each time the one at which the frame
        is first shown; ascending from 0, not necessarily evenly. Taken one at a time. Of frames
        in the same 1/90,000 of a second, only the first is stored.
      duration_secs: how long the clip lasts: the last frame is shown until then, but at least
        for a moment.
      fps: frames per second, about: it is the scale of x264's rate control.
      gop: frames from one key frame to the next.

    Raises:
      ValueError: no frames, or an odd height or width.
    """
    frames = iter(frames)
    head = next(frames, None)
    if head is None:
        raise ValueError("a clip needs at least one frame")
    _, first = head  # gives the size of the stream
    frames = itertools.chain([head], frames)
    options = {"crf": str(SAMPLING_CRF), "bf": "0", "sc_threshold": "0", "tune": "fastdecode"}
    file = io.BytesIO()
    with _cleared_memory(), av.open(file, "w", format="mp4") as container:
        stream = _add_stream(container, first.shape, fps, gop, options)
        stream.codec_context.time_base = Fraction(1, TICKS_PER_SEC)
        end = to_ticks(duration_secs)
        for packet in _with_durations(_encode_timed(frames, stream), end):
            container.mux(packet)
    return file.getvalue()


@contextlib.contextmanager
def _cleared_memory() -> Iterator[None]:
    """Have glibc clear the memory that it gives out.

    The assembler of x264's macroblock tree reads past the end of a row unless the width is a
    multiple of 128 (seen with the x264 165 of PyAV 18.1), so that the bytes of about one small clip
    in three depend on the memory that the process used before. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    mallopt(_M_PERTURB, 0xFF)  # glibc fills with the complement
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def _encode_timed(frames: Iterable, stream: av.VideoStream) -> Iterator[av.Packet]:
    reformatter = VideoReformatter()
    last = -1
    for secs, array in frames:
        frame = _to_yuv(array, reformatter)
        frame.time_base, frame.pts = Fraction(1, TICKS_PER_SEC), to_ticks(secs)
        if frame.pts > last:
            yield from stream.encode(frame)
            last = frame.pts
    yield from stream.encode()


def _with_durations(packets: Iterable[av.Packet], end: int) -> Iterator[av.Packet]:
    """Yield packets by time, each lasting until the next, the last until `end`."""
    for packet, following in itertools.pairwise(itertools.chain(packets, [None])):
        packet.duration = max(1, (following.pts if following else end) - packet.pts)
        yield packet


def to_ticks(secs: float) -> int:
    """Round down, so that no frame is shown later than it should."""
    return math.floor(secs * TICKS_PER_SEC + TICK_TOLERANCE)


def _to_yuv(array: UInt8[np.ndarray, "h w 3"], reformatter: VideoReformatter) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
    return reformatter.reformat(frame, format="yuv420p", threads=1)


def _add_stream(
    container: av.container.OutputContainer,
    frame_shape: tuple[int, ...],
    fps: float,
    gop: int,
    options: dict[str, str],
) -> av.VideoStream:
    height, width = frame_shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs frames of even height and width, not {height} x {width}")
    # MP4 stores the rate as a fraction; 1001 is the largest denominator in use (30000/1001).
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = height, width
    stream.pix_fmt = "yuv420p"
    stream.codec_context.gop_size = gop
    stream.codec_context.thread_count = 1  # x264 gives other bytes for other numbers of threads
    stream.options = {"preset": "veryfast", **options}
    return stream
