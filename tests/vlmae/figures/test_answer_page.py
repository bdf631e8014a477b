"""The page of what an evaluation found: nothing is cut off, and motion can be seen."""

import numpy as np
import pytest

from vlmae.figures.answer_page import (
    MIN_FRAME_SIDE,
    RIGHT,
    WRONG,
    Item,
    Line,
    Shown,
    draw_page,
)

SHADES = (40, 90, 140, 250)


def frames_of(row: int) -> np.ndarray:
    """Four frames, each of one shade."""
    return np.stack([np.full((16, 16, 3), shade, np.uint8) for shade in SHADES])


def shades_in(items: list[Item]) -> set[int]:
    pixels = np.asarray(draw_page(items, frames_of)).reshape(-1, 3)
    # Of a frame, and not of the smooth edges of letters.
    return {shade for shade in SHADES if (pixels == shade).all(axis=1).sum() > 1000}


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


def colors_in(item: Item) -> set[tuple[int, ...]]:
    pixels = np.asarray(draw_page([item], frames_of)).reshape(-1, 3)
    return {tuple(map(int, color)) for color in np.unique(pixels, axis=0)}


def test_truth_and_prediction_stand_apart_in_their_colors():
    """A line each between title and clip; the legend comes only where there are colors."""
    clip = [Shown(0, "", None)]
    plain = Item("what is it?", clip, [Line("truth: a dog")])
    wrong = Item("what is it?", clip, [Line("truth: a dog"), Line("answered: a cat", False)])
    assert WRONG in colors_in(wrong) and not {RIGHT, WRONG} & colors_in(plain)
    heights = [draw_page([item], frames_of).height for item in (plain, wrong)]
    assert heights[0] < heights[1]


def test_small_clips_are_enlarged():
    assert draw_page([Item("?", [Shown(0, "", None)])], frames_of).height > MIN_FRAME_SIDE
