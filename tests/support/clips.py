"""Clips whose frames say their own number."""

import tempfile
from collections.abc import Iterator, Sequence
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
    *,
    sound_secs: float = 0,
    **container_options: str,
) -> bytes:
    """A clip of numbered frames with the given time stamps.

    With `sound_secs`, sound begins at time 0, whenever the frames do.
    """
    with tempfile.NamedTemporaryFile() as file:  # some options write the file a second time
        with av.open(
            file.name, "w", format=container_format, container_options=container_options
        ) as out:
            _write_to(out, times_ms, codec, gop, bf, sound_secs)
        return file.read()


def _write_to(
    out: av.container.OutputContainer,
    times_ms: Sequence[int],
    codec: str,
    gop: int,
    bf: int,
    sound_secs: float,
) -> None:
    frames = numbered_frames(min(len(times_ms), 1 << NUM_BITS))
    stream = out.add_stream(codec, rate=25)
    stream.height, stream.width = 32, 64
    stream.pix_fmt = "rgb24" if codec == "apng" else "yuv420p"
    stream.codec_context.gop_size = gop
    stream.codec_context.thread_count = 1
    if codec == "libx264":
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.max_b_frames = bf
        # No key frames but those of `gop`; B-frames also where nothing would be gained by them.
        stream.options = {"sc_threshold": "0", "b_strategy": "0"}
    if codec == "mpeg4" and bf != 2:
        stream.codec_context.max_b_frames = bf
    packets = list(_sound(out, sound_secs)) if sound_secs else []
    for number, time in enumerate(times_ms):
        frame = av.VideoFrame.from_ndarray(frames[number % len(frames)], format="rgb24")
        frame.time_base = Fraction(1, 1000)
        frame.pts = time
        packets += stream.encode(frame)
    packets += stream.encode()
    for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
        out.mux(packet)


def _sound(out: av.container.OutputContainer, secs: float) -> Iterator[av.Packet]:
    """A hum in the default codec of the container."""
    codec, rate = out.default_audio_codec, 48_000
    stream = out.add_stream(codec, rate=rate, layout="mono")
    wave = (0.1 * np.sin(np.arange(int(secs * rate)) / 50)).astype(np.float32)
    sound = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
    sound.sample_rate, sound.pts = rate, 0
    yield from stream.encode(sound)
    yield from stream.encode()
