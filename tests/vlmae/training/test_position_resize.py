"""Resized positions against the formulas of the interpolations, sample by sample."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from oracles import random

from vlmae.models.embeddings import bicubic_matrix
from vlmae.training.init_weights import fit_positions

GRID, BIAS = "video_encoder/positions", "video_encoder/relative_bias/"


def cubic(x: float, a: float = -0.75) -> float:
    """Weight of a sample at distance x (Keys 1981), with PyTorch's a."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def centers(old: int, new: int) -> np.ndarray:
    """Places of the new samples among the old ones, by half-pixel centers."""
    return (np.arange(new) + 0.5) * old / new - 0.5


def bicubic(rows: np.ndarray, new: int) -> np.ndarray:
    """Resizes [n ...] along its first axis; borders are repeated."""
    out = np.zeros((new, *rows.shape[1:]))
    for i, center in enumerate(centers(len(rows), new)):
        for tap in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            out[i] += cubic(center - tap) * rows[min(max(tap, 0), len(rows) - 1)]
    return out


def linear(rows: np.ndarray, new: int) -> np.ndarray:
    """Resizes [n c] along its first axis; borders are repeated."""
    places, known = centers(len(rows), new), np.arange(len(rows))
    return np.stack([np.interp(places, known, column) for column in rows.T], axis=1)


def both_ways(resize, grid: np.ndarray, new: int) -> np.ndarray:
    """Resizes [n n c] in rows and columns, to [(m m) c]."""
    rows = resize(grid.reshape(len(grid), -1), new).reshape(new, len(grid), -1)
    columns = rows.swapaxes(0, 1)
    columns = resize(columns.reshape(len(grid), -1), new).reshape(new, new, -1)
    return columns.swapaxes(0, 1).reshape(new**2, -1)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (2, 5), (14, 14)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_grids_are_interpolated_bicubically_behind_their_prefix(old, new, prefix):
    source = random(prefix + old**2, 3)
    found = fit_positions(GRID, source, np.zeros((prefix + new**2, 3), np.float32))
    np.testing.assert_array_equal(found[:prefix], source[:prefix])
    expected = both_ways(bicubic, source[prefix:].reshape(old, old, 3), new)
    np.testing.assert_allclose(found[prefix:], expected, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(7, 13), (13, 7), (5, 5), (3, 9)])
@pytest.mark.parametrize("name", ["shared", "block_0"])
def test_offsets_are_interpolated_linearly_before_those_of_cls(old, new, name):
    source = random(old**2 + 3, 2)
    found = fit_positions(BIAS + name, source, np.zeros((new**2 + 3, 2), np.float32))
    np.testing.assert_array_equal(found[-3:], source[-3:])
    expected = both_ways(linear, source[:-3].reshape(old, old, 2), new)
    np.testing.assert_allclose(found[:-3], expected, atol=1e-5)


def test_frames_are_interpolated_linearly():
    """Twice as many by the two nearest; half as many by a triangle twice as wide."""
    name, source = "video_encoder/temporal/embedding", random(4, 3)
    longer = fit_positions(name, source, np.zeros((8, 3), np.float32))
    np.testing.assert_allclose(longer, linear(source, 8), atol=1e-5)
    distances = np.abs(np.arange(4) - np.array([[0.5], [2.5]]))
    weights = np.maximum(0, 1 - distances / 2)
    weights /= weights.sum(axis=1, keepdims=True)
    shorter = fit_positions(name, source, np.zeros((2, 3), np.float32))
    np.testing.assert_allclose(shorter, weights @ source, atol=1e-5)


@pytest.mark.parametrize("length", [3, 5, 9])
def test_words_keep_their_positions(length):
    source, initial = random(5, 3), random(length, 3, seed=1)
    found = fit_positions("text_encoder/embeddings/position/embedding", source, initial)
    common = min(5, length)
    np.testing.assert_array_equal(found[:common], source[:common])
    np.testing.assert_array_equal(found[common:], initial[common:])


@pytest.mark.parametrize(
    ("name", "source", "initial"),
    [
        (GRID, (16, 4), (25, 6)),  # another width
        (GRID, (16,), (25,)),
        (GRID, (2, 16, 4), (2, 25, 4)),
        (GRID, (17, 4), (25, 4)),  # another prefix
        (GRID, (16, 4), (20, 4)),  # no square
        ("video_encoder/positions_2", (16, 4), (25, 4)),
        ("text_encoder/embeddings/word/embedding", (16, 4), (25, 4)),
        ("pixel_decoder/relative_bias/shared", (28, 4), (52, 4)),
    ],
)
def test_what_is_no_table_of_positions_is_left_alone(name, source, initial):
    assert fit_positions(name, np.ones(source), np.zeros(initial)) is None


@hypothesis.given(st.integers(1, 30), st.integers(1, 30))
def test_bicubic_weights_sum_to_one_and_are_symmetric(old, new):
    weights = bicubic_matrix(old, new)
    assert weights.shape == (new, old)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-5)
    np.testing.assert_allclose(weights, bicubic(np.eye(old), new), atol=1e-5)
    if old == new:
        np.testing.assert_allclose(weights, np.eye(old), atol=1e-6)
