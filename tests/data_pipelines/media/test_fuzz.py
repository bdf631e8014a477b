"""Damaged files of every container and image format: decoded, or refused by DecodeError."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, features

from data_pipelines.media import decode, images
from data_pipelines.media.errors import OURS
from data_pipelines.media.reencode import Reencode, reencode
from data_pipelines.media.sampling import segment_times

CLIPS = (  # container, codec, seconds of sound
    *[("mp4", "libx264", 0.3), ("mov", "mpeg4", 0), ("matroska", "libx264", 0.3)],
    *[("webm", "libvpx", 0), ("avi", "mpeg4", 0), ("mpegts", "libx264", 0.3), ("flv", "flv", 0)],
    *[
        ("mpeg", "mpeg2video", 0),
        ("asf", "wmv2", 0),
        ("ogg", "libvpx", 0),
        ("mxf", "mpeg2video", 0),
    ],
    *[("nut", "libx264", 0), ("3gp", "mpeg4", 0), ("apng", "apng", 0)],
)
IMAGES = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ANIMATIONS = ("PNG", "WEBP", "GIF")
# What our own mistakes would raise: `as_decode_errors` must not hide them in what Pillow reads.
MISTAKES = (*OURS, AssertionError, NotImplementedError)


@pytest.fixture(scope="module")
def samples(write_clip, numbered_frames) -> list[tuple[str, bytes, str]]:
    """(name, media, media type) of a small file in every format."""
    found = [
        (f"{container} {codec}", write_clip(range(0, 640, 40), container, codec, sound_secs=secs))
        for container, codec, secs in CLIPS
    ]
    clips = [(name, media, "video") for name, media in found]
    pictures = [Image.fromarray(frame) for frame in numbered_frames(4)]
    for kind in IMAGES:
        if kind != "AVIF" or features.check("avif"):
            clips.append(
                (kind, encode(pictures[:2] if kind == "MPO" else pictures[:1], kind), "image")
            )
    clips += [(f"animated {kind}", encode(pictures, kind), "video") for kind in ANIMATIONS]
    gray = Image.fromarray(np.full((16, 16), 0x8000, np.uint16))
    return [*clips, ("gray of 16 bits", encode([gray], "PNG"), "image")]


def encode(pictures: list[Image.Image], kind: str) -> bytes:
    file, several = io.BytesIO(), len(pictures) > 1
    options = {"save_all": True, "append_images": pictures[1:], "duration": 100} if several else {}
    pictures[0].save(file, kind, **options)
    return file.getvalue()


def mutate(media: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, overwrite, cut out, repeat or cut off a part; headers are met more often."""
    data = bytearray(media)
    for _ in range(rng.integers(1, 4)):
        reach = len(data) if rng.random() < 0.5 else min(len(data), 512)
        start = int(rng.integers(reach))
        stop = min(len(data), start + int(rng.integers(1, 64)))
        kind = rng.integers(6)
        if kind == 0:
            data[start] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[start:stop] = rng.integers(0, 256, stop - start, np.uint8).tobytes()
        elif kind == 2:
            data[start:stop] = bytes([rng.choice([0, 0x7F, 0x80, 0xFF])]) * (stop - start)
        elif kind == 3:
            del data[start:stop]
        elif kind == 4:
            data[start:start] = data[start:stop]
        else:
            del data[int(rng.integers(len(data) // 4, len(data))) :]
        if len(data) < 2:
            break
    return bytes(data)


def use(media: bytes, media_type: str) -> None:
    """Everything that preparing, training and searching do with a file."""
    decode.check_media(media, media_type)
    reencode(media, media_type, Reencode(short_side=16))
    reencode(media, media_type, Reencode(short_side=16, fps=8))
    if media_type == "image":
        images.decode_image(media)
        return
    with decode.open_clip(media) as clip:
        clip.frames(segment_times(clip.info.duration_secs, 4))
        clip.frames([0.1, 0.0])


def strange(samples, rounds: int, seed: int) -> Iterator[str]:
    for place, (name, media, media_type) in enumerate(samples):
        for number in range(rounds):
            damaged = mutate(media, np.random.default_rng((seed, place, number)))
            try:
                use(damaged, media_type)
            except decode.DecodeError as error:
                if isinstance(error.__cause__, MISTAKES):
                    yield f"{name}, mutation {seed} {place} {number}: {error.__cause__!r}"
            except Exception as error:
                yield f"{name}, mutation {seed} {place} {number}: {error!r}"


def test_every_sample_is_read(samples):
    for name, media, media_type in samples:
        if name != "animated WEBP":
            use(media, media_type)


def test_hundreds_of_damaged_files(samples):
    assert list(strange(samples, 12, seed=0)) == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_tens_of_thousands_of_damaged_files(samples):
    assert list(strange(samples, 1500, seed=1)) == []
