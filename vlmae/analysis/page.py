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
    """Every item below the other: its title, and the middle frame of each clip, of a single one all
    frames; framed in green if it is right and in red if it is wrong, with its label."""
    return stack([picture for item in items for picture in _draw(item, frames_of)])


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` places, evenly spread.

    >>> spread(10, 3), spread(2, 3)
    ([0, 4, 9], [0, 1])
    """
    return sorted({int(place) for place in np.linspace(0, count - 1, min(wanted, count))})


def _draw(item: Item, frames_of: Callable) -> list[Picture]:
    images = []
    for shown in item.clips:
        frames = frames_of(shown.row)
        middle = len(frames) // 2
        images.append(_draw_clip(shown, frames if len(item.clips) == 1 else frames[[middle]]))
    width = sum(image.width + MARGIN for image in images)
    row = Image.new("RGB", (width, max(image.height for image in images) + 2 * MARGIN), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + MARGIN
    return [_text(item.title, max(width, _text_width(item.title))), row]


def _draw_clip(shown: Shown, frames: UInt8[np.ndarray, "t h w 3"]) -> Picture:
    strip = np.concatenate(frames, axis=1)
    scale = max(1, MIN_FRAME_SIDE // len(strip))
    image = Image.fromarray(strip.repeat(scale, 0).repeat(scale, 1))
    color = PLAIN if shown.right is None else RIGHT if shown.right else WRONG
    framed = ImageOps.expand(image, BORDER, color)
    return stack([framed, _text(shown.label, framed.width)])


def _text(text: str, width: int) -> Picture:
    """A line of text, cut off where the picture ends."""
    picture = Image.new("RGB", (max(width, 1), TITLE_HEIGHT), "white")
    ImageDraw.Draw(picture).text((MARGIN, MARGIN), text, fill="black")
    return picture


def _text_width(text: str) -> int:
    """Pixels that a line needs, with its margins."""
    return 2 * MARGIN + int(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text))
