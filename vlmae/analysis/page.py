"""A page of what an evaluation found: questions with the clips that were given as their answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageOps
from PIL.Image import Image as Picture

from vlmae.analysis.picture import BORDER, MARGIN, MIN_FRAME_SIDE, TITLE_HEIGHT, stack

RIGHT, WRONG, PLAIN = (40, 150, 60), (200, 50, 50), (120, 120, 120)


class Shown(NamedTuple):
    """One clip of an answer."""

    row: int  # of the clip in the evaluation data
    label: str
    right: bool | None  # None: neither


class Item(NamedTuple):
    """One question or query, with the clips to show below it."""

    title: str
    clips: Sequence[Shown]


def draw_page(
    items: Sequence[Item], frames_of: Callable[[int], UInt8[np.ndarray, "t h w 3"]]
) -> Picture:
    """Every item below the other: its title, and the middle frame of each clip in a frame that is
    green if it is right and red if it is wrong, with its label."""
    return stack([picture for item in items for picture in _draw(item, frames_of)])


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` places, evenly spread.

    >>> spread(10, 3), spread(2, 3)
    ([0, 4, 9], [0, 1])
    """
    return sorted({int(place) for place in np.linspace(0, count - 1, min(wanted, count))})


def _draw(item: Item, frames_of: Callable) -> list[Picture]:
    images = [_draw_clip(shown, frames_of(shown.row)) for shown in item.clips]
    width = sum(image.width + MARGIN for image in images)
    title = _text(item.title, width)
    row = Image.new("RGB", (width, max(image.height for image in images) + 2 * MARGIN), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + MARGIN
    return [title, row]


def _draw_clip(shown: Shown, frames: UInt8[np.ndarray, "t h w 3"]) -> Picture:
    frame = frames[len(frames) // 2]
    scale = max(1, MIN_FRAME_SIDE // len(frame))
    image = Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1))
    color = PLAIN if shown.right is None else RIGHT if shown.right else WRONG
    framed = ImageOps.expand(image, BORDER, color)
    return stack([framed, _text(shown.label, framed.width)])


def _text(text: str, width: int) -> Picture:
    picture = Image.new("RGB", (max(width, 1), TITLE_HEIGHT), "white")
    ImageDraw.Draw(picture).text((MARGIN, MARGIN), text, fill="black")
    return picture
