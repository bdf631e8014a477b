"""Media encoded again, so that sampling a few frames is cheap; done once, while they are stored.

Published clips are made for watching: large, at 25 frames per second and more, with key frames
many seconds apart, so that showing one frame means decoding hundreds.
"""

import dataclasses
import math
from typing import Literal

from data_pipelines.media import decode
from data_pipelines.media.errors import OURS, as_decode_errors
from data_pipelines.media.frames import encode_frames
from data_pipelines.media.images import shrink_image
from data_pipelines.media.video_writer import encode_for_sampling
from data_pipelines.schema.checks import check

LEAST_SIDE = 16  # pixels
_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Reencode:
    """Settings of encoding media again while they are stored (ours); nothing is ever enlarged.

    A clip keeps its duration and its aspect, loses its sound, and shows at every time what it
    showed before: with `fps`, at multiples of 1 / fps. Images are only made smaller.
    """

    short_side: int | None = None
    """Height or width in pixels, whichever is less; even. Smaller media keep their size."""
    fps: float | None = None
    """Frames per second; clips of a lower rate keep all of their frames, as all do without it."""
    key_frames: int = 8
    """Frames from one key frame to the next."""
    store: Literal["video", "frames"] = "video"
    """Clips as H.264, or as JPEG pictures: larger, and several times faster to sample."""
    quality: int = 90
    """JPEG quality of pictures, 1 to 100."""

    def __post_init__(self):
        side, fps = self.short_side, self.fps
        check(
            side is None or (side >= LEAST_SIDE and side % 2 == 0),
            f"short_side must be even and at least {LEAST_SIDE}, not {side}",
        )
        check(fps is None or (math.isfinite(fps) and fps > 0), f"fps must be positive, not {fps}")
        check(self.key_frames >= 1, f"key_frames must be at least 1, not {self.key_frames}")
        forms = ("video", "frames")
        check(self.store in forms, f"store must be one of {', '.join(forms)}, not {self.store!r}")
        check(1 <= self.quality <= 100, f"quality must be 1 to 100, not {self.quality}")

    def __str__(self) -> str:
        side = f"short side {self.short_side}" if self.short_side else "size kept"
        fps = f"{self.fps:g} frames per second" if self.fps else "all frames"
        if self.store == "frames":
            return f"{side}, {fps}, as JPEG pictures of quality {self.quality}"
        return f"{side}, {fps}, a key frame every {self.key_frames}"


def reencode(
    media: bytes, media_type: Literal["video", "image"], setting: Reencode | None
) -> bytes:
    """Encode media as they are stored; without a setting they stay untouched (ours).

    Raises:
      DecodeError: they cannot be decoded as a whole.
    """
    if setting is None:
        return media
    if media_type == "image":
        return (
            shrink_image(media, setting.short_side, _JPEG_QUALITY) if setting.short_side else media
        )
    with decode.open_clip(media) as clip:
        fps = setting.fps if setting.fps and setting.fps < clip.info.fps else None
        size = even_size(*clip.size, setting.short_side)
        # By way of RGB, as for training: so colors come out the same, whatever the stream's are.
        # One frame at a time: a long clip need not fit memory.
        with as_decode_errors("not to be encoded again", OURS):  # say, a frame of days
            frames, duration = clip.walk(fps, size), clip.info.duration_secs
            if setting.store == "frames":
                return encode_frames(frames, duration, setting.quality)
            rate = fps or clip.info.fps
            return encode_for_sampling(frames, duration, fps=rate, gop=setting.key_frames)


def even_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Return height and width, both even, for a short side of at most `short_side`.

    >>> even_size(720, 1280, 256), even_size(1280, 720, 256), even_size(145, 99, None)
    ((256, 456), (456, 256), (144, 98))
    """
    scale = min(1.0, (short_side or math.inf) / min(height, width))
    halves = (min(round(side * scale / 2), side // 2) for side in (height, width))
    return tuple(2 * max(1, half) for half in halves)
