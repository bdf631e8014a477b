"""Page of an evaluation's results: queries or questions with the clips of their answers."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.Image import Image as Picture

MARGIN, TITLE_HEIGHT, BORDER = 4, 20, 3  # pixels
FONT_SIZE, TITLE_SIZE = 12, 14
MIN_FRAME_SIDE = 144  # smaller frames are enlarged by whole pixels
RIGHT, WRONG, PLAIN = (30, 130, 50), (200, 50, 50), (120, 120, 120)


class Shown(NamedTuple):
    """Clip that is shown below a question."""

    row: int  # of the clip in the evaluation data
    label: str
    right: bool | None  # None: a gray frame, where right and wrong do not apply


class Line(NamedTuple):
    """Line of text between a title and its clips: the truth, a prediction with its score."""

    text: str
    right: bool | None = None  # None: in black, where right and wrong do not apply


class Item(NamedTuple):
    """Question or query with the clips below it."""

    title: str
    clips: Sequence[Shown]
    lines: Sequence[Line] = ()


def draw_page(
    items: Sequence[Item], frames_of: Callable[[int], UInt8[np.ndarray, "t h w 3"]]
) -> Picture:
    """Draw all items below one another: title, lines, and clips, green (right) or red (wrong).

    A legend of the colors comes first, if there are any. A single clip is shown with all frames,
    several with their middle frames.

    Args:
      items: what to draw.
      frames_of: reads the frames of a clip by its row in the evaluation data.
    """
    judged = {part.right for item in items for part in (*item.clips, *item.lines)}
    legend = [draw_legend(None in {x.right for item in items for x in item.clips})]
    pictures = [picture for item in items for picture in _draw(item, frames_of)]
    return stack((legend if judged & {True, False} else []) + pictures)


def draw_legend(has_plain: bool) -> Picture:
    """Draw what the colors say; `has_plain`: gray frames are among them."""
    entries = [(RIGHT, "right"), (WRONG, "wrong")]
    entries += [(PLAIN, "not judged")] * has_plain
    width = sum(TITLE_HEIGHT + text_width(name) + 4 * MARGIN for _, name in entries)
    picture = Image.new("RGB", (width, TITLE_HEIGHT), "white")
    draw, left = ImageDraw.Draw(picture), MARGIN
    for color, name in entries:
        side = TITLE_HEIGHT - 2 * MARGIN
        draw.rectangle((left, MARGIN, left + side - 1, MARGIN + side - 1), fill=color)
        left += side + MARGIN
        draw.text((left, MARGIN - 1), name, fill="black", font=font())
        left += text_width(name) + 3 * MARGIN
    return picture


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
    texts = [text_line(item.title, size=TITLE_SIZE)]
    texts += [text_line(line.text, color=_color(line.right, (0, 0, 0))) for line in item.lines]
    return [*texts, row]


def _draw_clip(shown: Shown, frames: UInt8[np.ndarray, "t h w 3"]) -> Picture:
    framed = ImageOps.expand(enlarged(np.concatenate(frames, axis=1)), BORDER, _color(shown.right))
    return stack([framed, text_line(shown.label)]) if shown.label else framed


def enlarged(frame: UInt8[np.ndarray, "h w 3"]) -> Picture:
    """Draw a frame at least MIN_FRAME_SIDE high, by whole multiples so that edges stay sharp."""
    scale = max(1, round(MIN_FRAME_SIDE / len(frame)))
    return Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1))


def _color(right: bool | None, plain: tuple[int, int, int] = PLAIN) -> tuple[int, int, int]:
    return plain if right is None else RIGHT if right else WRONG


@functools.lru_cache
def font(size: int = FONT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load Pillow's own font."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int = FONT_SIZE) -> int:
    """Measure a line of text in pixels."""
    return int(font(size).getlength(text)) + 1


def text_line(text: str, color: tuple[int, int, int] = (0, 0, 0), size: int = FONT_SIZE) -> Picture:
    """Draw a line of text, as wide as it is."""
    line = Image.new("RGB", (text_width(text, size) + 2 * MARGIN, TITLE_HEIGHT), "white")
    ImageDraw.Draw(line).text((MARGIN, 2), text, fill=color, font=font(size))
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
