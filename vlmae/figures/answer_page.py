"""Page of an evaluation's results: queries or questions with the clips of their answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageOps
from PIL.Image import Image as Picture

MARGIN, TITLE_HEIGHT, BORDER = 4, 20, 3  # pixels
MIN_FRAME_SIDE = 96  # smaller frames are enlarged by whole pixels
RIGHT, WRONG, PLAIN = (40, 150, 60), (200, 50, 50), (120, 120, 120)


class Shown(NamedTuple):
    """Clip that is shown below a question."""

    row: int  # of the clip in the evaluation data
    label: str
    right: bool | None  # None: a gray frame, where right and wrong do not apply


class Item(NamedTuple):
    """Question or query with the clips below it."""

    title: str
    clips: Sequence[Shown]


def draw_page(
    items: Sequence[Item], frames_of: Callable[[int], UInt8[np.ndarray, "t h w 3"]]
) -> Picture:
    """Draw all items below one another: a title, and clips framed green (right) or red (wrong).

    A single clip is shown with all frames, several with their middle frames.

    Args:
      items: what to draw.
      frames_of: reads the frames of a clip by its row in the evaluation data.
    """
    return stack([picture for item in items for picture in _draw(item, frames_of)])


def spread(count: int, wanted: int) -> list[int]:
    """Pick at most `wanted` of `count` indices, evenly spread.

    >>> spread(10, 3), spread(2, 3)
    ([0, 4, 9], [0, 1])
    """
    return sorted({int(i) for i in np.linspace(0, count - 1, min(wanted, count))})


def _draw(item: Item, frames_of: Callable) -> list[Picture]:
    images = []
    for shown in item.clips:
        frames = frames_of(shown.row)
        # One frame each where several clips stand side by side; the whole clip where it is alone.
        middle = len(frames) // 2
        images.append(_draw_clip(shown, frames if len(item.clips) == 1 else frames[[middle]]))
    width = sum(image.width + MARGIN for image in images)
    row = Image.new("RGB", (width, max(image.height for image in images) + 2 * MARGIN), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + MARGIN
    # As wide as the longer of both, so that no title is cut off.
    title_width = 2 * MARGIN + int(ImageDraw.Draw(row).textlength(item.title))
    return [text_line(item.title, max(width, title_width)), row]


def _draw_clip(shown: Shown, frames: UInt8[np.ndarray, "t h w 3"]) -> Picture:
    strip = np.concatenate(frames, axis=1)
    scale = max(1, MIN_FRAME_SIDE // len(strip))
    image = Image.fromarray(strip.repeat(scale, 0).repeat(scale, 1))
    color = PLAIN if shown.right is None else RIGHT if shown.right else WRONG
    framed = ImageOps.expand(image, BORDER, color)
    return stack([framed, text_line(shown.label, framed.width)])


def text_line(text: str, width: int) -> Picture:
    """Draw a line of text, cut off at `width` pixels."""
    line = Image.new("RGB", (max(width, 1), TITLE_HEIGHT), "white")
    ImageDraw.Draw(line).text((MARGIN, MARGIN), text, fill="black")
    return line


def stack(images: list[Picture]) -> Picture:
    """Stack images below one another on white."""
    height = sum(image.height for image in images)
    whole = Image.new("RGB", (max(image.width for image in images), height), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    return whole
