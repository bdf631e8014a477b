"""The page of what an evaluation found: nothing is cut off, and motion can be seen."""

import numpy as np
import pytest

from vlmae.figures.answer_page import RIGHT, WRONG, Item, Shown, draw_page

SHADES = (40, 90, 140, 250)


def frames_of(row: int) -> np.ndarray:
    """Four frames, each of one shade."""
    return np.stack([np.full((16, 16, 3), shade, np.uint8) for shade in SHADES])


def shades_in(items: list[Item]) -> set[int]:
    colors = np.unique(np.asarray(draw_page(items, frames_of)).reshape(-1, 3), axis=0)
    return {int(red) for red, green, blue in colors if red == green == blue} & set(SHADES)


@pytest.mark.parametrize(("clips", "seen"), [(1, set(SHADES)), (2, {SHADES[2]})])
def test_a_single_clip_is_shown_with_all_frames(clips, seen):
    assert shades_in([Item("?", [Shown(i, "", None) for i in range(clips)])]) == seen


def test_a_long_title_is_not_cut_off():
    title = "which of the many things that can be seen here moves from left to right, and then up?"
    short, long = (draw_page([Item(t, [Shown(0, "", None)] * 2)], frames_of) for t in ("?", title))
    assert long.width > short.width
    ink = np.argwhere((np.asarray(long)[:15] < 128).all(axis=2))[:, 1]
    assert short.width < ink.max() < long.width - 1


def test_the_frame_says_what_is_right():
    items = [Item("?", [Shown(0, "yes", True), Shown(1, "no", False)])]
    pixels = np.asarray(draw_page(items, frames_of)).reshape(-1, 3)
    assert all((pixels == color).all(axis=1).any() for color in (RIGHT, WRONG))
