"""Frames to H.264 files, for the data sets that we make ourselves and for tests."""

import io
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8


def encode_video(
    frames: UInt8[np.ndarray, "t h w 3"], fps: float, *, gop: int = 12, crf: int = 18
) -> bytes:
    """An MP4 file with one H.264 stream of RGB frames; equal input gives equal bytes (ours).

    Args:
      frames: height and width must be even, because color is stored at half resolution.
      fps: frames per second, constant.
      gop: frames from one key frame to the next, at most.
      crf: x264's quality, 0 (lossless) to 51.

    Raises:
      ValueError: no frames, or an odd height or width.
    """
    if len(frames) == 0 or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"H.264 needs frames of even height and width, not {frames.shape}")
    file = io.BytesIO()
    reformatter = VideoReformatter()
    with av.open(file, "w", format="mp4") as container:
        stream = _add_stream(container, frames, fps, gop, crf)
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = reformatter.reformat(frame, format="yuv420p", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _add_stream(
    container: av.container.OutputContainer, frames: np.ndarray, fps: float, gop: int, crf: int
) -> av.VideoStream:
    # MP4 stores the rate as a fraction; 1001 is the largest denominator in use (30000/1001).
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.gop_size = gop
    stream.codec_context.thread_count = 1  # x264 gives other bytes for other numbers of threads
    stream.options = {"crf": str(crf), "preset": "veryfast"}
    return stream
