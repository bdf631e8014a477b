"""Media in a form that is cheap to sample a few frames from, made once, while they are stored.

Published clips are made for watching: large, at 25 frames per second and more, with key frames
many seconds apart, so that showing one frame means decoding hundreds.
"""

import dataclasses
import io
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image

from data_pipelines import decode
from data_pipelines.config import check
from data_pipelines.encode import encode_for_sampling

LEAST_SIDE = 16  # pixels
_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Reencode:
    """How media are encoded again while they are stored (ours); nothing is ever enlarged.

    A clip keeps its duration and its aspect, loses its sound, and shows at every time what it
    showed before: with `fps`, at multiples of 1 / fps. Images are only made smaller.
    """

    short_side: int | None = None
    """Height or width in pixels, whichever is less; even. Smaller media keep their size."""
    fps: float | None = None
    """Frames per second; clips of a lower rate keep all of their frames, as all do without it."""
    key_frames: int = 8
    """Frames from one key frame to the next."""

    def __post_init__(self):
        side, fps = self.short_side, self.fps
        check(
            side is None or (side >= LEAST_SIDE and side % 2 == 0),
            f"short_side must be even and at least {LEAST_SIDE}, not {side}",
        )
        check(fps is None or (math.isfinite(fps) and fps > 0), f"fps must be positive, not {fps}")
        check(self.key_frames >= 1, f"key_frames must be at least 1, not {self.key_frames}")

    def __str__(self) -> str:
        side = f"short side {self.short_side}" if self.short_side else "size kept"
        fps = f"{self.fps:g} frames per second" if self.fps else "all frames"
        return f"{side}, {fps}, a key frame every {self.key_frames}"


def reencode(
    media: bytes, media_type: Literal["video", "image"], setting: Reencode | None
) -> bytes:
    """Media in the form that is stored; untouched without a setting (ours).

    Raises:
      DecodeError: they cannot be decoded as a whole.
    """
    if setting is None:
        return media
    if media_type == "image":
        return _resize_image(media, setting.short_side)
    with decode.open_clip(media) as clip:
        fps = setting.fps if setting.fps and setting.fps < clip.info.fps else None
        return encode_for_sampling(
            _resized(clip, fps, setting.short_side),
            clip.info.duration_secs,
            fps=fps or clip.info.fps,
            gop=setting.key_frames,
        )


def even_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Height and width, even, of a frame whose short side is at most `short_side`.

    >>> even_size(720, 1280, 256), even_size(1280, 720, 256), even_size(145, 99, None)
    ((256, 456), (456, 256), (144, 98))
    """
    scale = min(1.0, (short_side or math.inf) / min(height, width))
    halves = (min(round(side * scale / 2), side // 2) for side in (height, width))
    return tuple(2 * max(1, half) for half in halves)


def _resized(
    clip: decode.Clip, fps: float | None, short_side: int | None
) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
    """(seconds, frame) of a clip; a stream may change its frame size, the first one holds."""
    reformatter = VideoReformatter()
    size = None
    for secs, frame in clip.walk(fps):
        if size is None:
            size = even_size(frame.height, frame.width, short_side)
        # By way of RGB, as for training: so colors come out the same, whatever the stream's are.
        rgb = reformatter.reformat(
            frame, size[1], size[0], "rgb24", interpolation="BICUBIC", threads=1
        )
        yield secs, rgb.to_ndarray()


def _resize_image(media: bytes, short_side: int | None) -> bytes:
    """The image itself if it is small enough; else a JPEG file if it was one, or PNG."""
    with Image.open(io.BytesIO(media), formats=decode.IMAGE_FORMATS) as image:
        jpeg = image.format == "JPEG"
        if short_side is None or min(image.size) <= short_side:
            return media
    image = Image.fromarray(decode.decode_image(media))
    scale = short_side / min(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    file = io.BytesIO()
    options = {"quality": _JPEG_QUALITY} if jpeg else {}
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG" if jpeg else "PNG", **options)
    return file.getvalue()
