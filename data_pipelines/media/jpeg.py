"""JPEG files to uint8 RGB and back, by libjpeg-turbo (simplejpeg)."""

import numpy as np
import simplejpeg
from jaxtyping import UInt8

# Divisors of sides that libjpeg decodes at, in less time than whole pictures take.
REDUCTIONS = (8, 4, 2)


def read_jpeg(
    media: bytes, size: tuple[int, int], reduction: int = 1
) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a JPEG file, at a whole fraction of its size if asked for.

    A reduced picture is what its discrete cosines of low frequency say, so it has no aliasing.

    Args:
      media: the file.
      size: its height and width.
      reduction: 1, or one of `REDUCTIONS`; sides are divided by it and rounded up.

    Raises:
      ValueError: damaged.
    """
    height, width = (-(-side // reduction) for side in size)
    return simplejpeg.decode_jpeg(media, min_height=height, min_width=width)


def write_jpeg(frame: UInt8[np.ndarray, "h w 3"], quality: int) -> bytes:
    """Encode a JPEG file with color at half resolution, as that of video; equal in, equal out.

    Raises:
      ValueError: a side is above 65,500 pixels.
    """
    frame = np.ascontiguousarray(frame)
    return simplejpeg.encode_jpeg(frame, quality, "RGB", colorsubsampling="420")


def largest_reduction(box_height: float, box_width: float, size: int) -> int:
    """Return the largest reduction that leaves a part of a picture no smaller than it is needed.

    >>> largest_reduction(480, 640, 224), largest_reduction(448, 900, 224)
    (2, 2)
    >>> largest_reduction(400, 900, 224), largest_reduction(2000, 3000, 224)
    (1, 8)
    """
    least = min(box_height, box_width)
    return next((reduction for reduction in REDUCTIONS if least >= reduction * size), 1)
