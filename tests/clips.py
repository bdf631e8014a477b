"""Clips whose frames say their own number."""

import tempfile
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

NUM_BITS = 8


def numbered_frames(num_frames: int) -> np.ndarray:
    """Frame i shows i as eight black or white bars."""
    bits = (np.arange(num_frames)[:, None] >> np.arange(NUM_BITS)) & 1
    bars = np.repeat(bits * 255, 8, axis=1).astype(np.uint8)
    return np.broadcast_to(bars[:, None, :, None], (num_frames, 32, 64, 3)).copy()


def read_numbers(frames: np.ndarray) -> list[int]:
    bits = frames[:, 16, 4::8].mean(axis=-1) > 127
    return (bits << np.arange(NUM_BITS)).sum(axis=-1).tolist()


def write_clip(
    times_ms: Sequence[int],
    container_format: str = "mp4",
    codec: str = "libx264",
    gop: int = 12,
    bf: int = 2,
    **container_options: str,
) -> bytes:
    """A clip of numbered frames with the given time stamps."""
    with tempfile.NamedTemporaryFile() as file:  # some options write the file a second time
        _write_to(file.name, times_ms, container_format, codec, gop, bf, container_options)
        return file.read()


def _write_to(
    path: str,
    times_ms: Sequence[int],
    container_format: str,
    codec: str,
    gop: int,
    bf: int,
    options: dict,
) -> None:
    frames = numbered_frames(len(times_ms))
    with av.open(path, "w", format=container_format, container_options=options) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            stream.codec_context.time_base = Fraction(1, 1000)
            stream.codec_context.max_b_frames = bf
            # No key frames but those of `gop`; B-frames also where nothing would be gained by them.
            stream.options = {"sc_threshold": "0", "b_strategy": "0"}
        for array, time in zip(frames, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = time
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
