"""How the frames of a stream are shown: size of a pixel, quarter turns, mirror images."""

from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

# Ratios beyond these come from damaged headers; the most oblong pixels in use are 2.2 : 1.
_MAX_PIXEL_ASPECT = 8


class Display(NamedTuple):
    """Size of a stream's frames as they are shown, and how they are turned from what is stored.

    The turn is one of eight: first the picture is transposed or not, then mirrored or not.
    """

    height: int
    width: int
    transposed: bool = False
    mirror_rows: bool = False  # top and bottom change places
    mirror_columns: bool = False


def display_of(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> Display:
    """Read from a frame how its stream is shown (ours, as browsers do).

    Args:
      frame: the first one of the stream.
      pixel_aspect: width of a pixel over its height; None or 0: square. No pixel is lost: wide ones
        make the picture wider, tall ones higher.
    """
    height, width = frame.height, frame.width
    aspect = pixel_aspect or Fraction(1)
    if 1 < aspect <= _MAX_PIXEL_ASPECT:
        width = round(width * aspect)
    elif 1 > aspect >= Fraction(1, _MAX_PIXEL_ASPECT):
        height = round(height / aspect)
    # A stored point (x, y) is shown at (a x + c y, b x + d y), axes to the right and down. Angles
    # between the quarter turns are rounded to one, as players do.
    a, b, c, d = _matrix(frame)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Display(width, height, True, mirror_rows=b < 0, mirror_columns=c < 0)
    return Display(height, width, False, mirror_rows=d < 0, mirror_columns=a < 0)


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Return a, b, c and d of the display matrix; the identity if there is none."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a kind that these bindings do not know
        data = None
    if data is None or data.buffer_size < 36:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = map(int, np.frombuffer(bytes(data), np.int32))
    return a, b, c, d


def to_rgb(
    frame: av.VideoFrame,
    display: Display,
    reformatter: VideoReformatter,
    size: tuple[int, int] | None = None,
    interpolation: str | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Convert a frame to RGB as it is shown, at another size if one is given (height, width)."""
    height, width = size or (display.height, display.width)
    if display.transposed:
        height, width = width, height
    # More than one thread makes the conversion of small frames many times slower.
    rgb = reformatter.reformat(
        frame, width, height, "rgb24", interpolation=interpolation, threads=1
    ).to_ndarray()
    rgb = rgb.swapaxes(0, 1) if display.transposed else rgb
    return rgb[:: -1 if display.mirror_rows else 1, :: -1 if display.mirror_columns else 1]
