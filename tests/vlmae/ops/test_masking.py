"""Visual masks: counts, complements, and the properties of each scheme."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from vlmae.config.model import MaskConfig
from vlmae.ops.grid import grid_cell
from vlmae.ops.masking import draw_mask, mask_from_noise, num_keep

SHAPE = (3, 4, 4, 6)  # clips, frames, rows and columns of patches
FRAMES, PATCHES = 4, 24


def draw(scheme: str, ratio: float, seed: int = 0):
    return draw_mask(jax.random.key(seed), scheme, ratio, SHAPE)


@pytest.mark.parametrize(
    ("num_patches", "ratio", "expected"),
    [
        (196, 0.65, 68),
        (1568, 0.9, 156),
        (196, 0.75, 49),
        (196, 0.0, 196),
        (10, 0.7, 3),  # 10 * (1 - 0.7) is 3.0000000000000004 in floating point ...
        (10, 0.9, 1),  # ... and 10 * (1 - 0.9) is 0.9999999999999998
        (100, 0.57, 43),  # 43.00000000000001
        (20, 0.95, 1),
        (4, 0.99, 1),  # never none
    ],
)
def test_num_keep(num_patches, ratio, expected):
    kept = num_keep(num_patches, ratio)
    assert kept == expected
    assert type(kept) is int


def test_num_keep_never_loses_a_patch_to_floating_point():
    for num_patches in (49, 196, 256, 784, 1568):
        for removed in range(num_patches):
            assert num_keep(num_patches, removed / num_patches) == num_patches - removed


def test_the_lowest_noise_is_kept():
    noise = jnp.array([[[0.3, 0.1, 0.9, 0.2, 0.8, 0.7, 0.5, 0.6]]])
    mask = mask_from_noise(noise, 0.6)
    np.testing.assert_array_equal(mask.kept_ids, [[[0, 1, 3]]])
    np.testing.assert_array_equal(mask.removed_mask[0, 0], [0, 0, 1, 0, 1, 1, 1, 1])


def test_ratio_zero_keeps_every_patch():
    mask = draw("random", 0.0)
    np.testing.assert_array_equal(mask.kept_ids, np.broadcast_to(range(PATCHES), (3, 4, PATCHES)))
    assert not mask.removed_mask.any()


def test_random_masks_differ_between_frames_clips_and_keys():
    removed = np.asarray(draw("random", 0.5).removed_mask).reshape(-1, PATCHES)
    assert len(np.unique(removed, axis=0)) == len(removed)
    assert (removed != np.asarray(draw("random", 0.5, seed=1).removed_mask).reshape(-1, 24)).any()


def test_random_masks_treat_every_patch_alike():
    mask = draw_mask(jax.random.key(0), "random", 0.65, (2000, 1, 4, 6))
    frequency = np.asarray(mask.removed_mask).mean(axis=(0, 1))
    np.testing.assert_allclose(frequency, 1 - 8 / 24, atol=0.05)  # 4.7 standard deviations


def test_a_tube_is_one_mask_for_all_frames_of_a_clip():
    removed = np.asarray(draw("tube", 0.65).removed_mask)
    np.testing.assert_array_equal(removed, np.repeat(removed[:, :1], FRAMES, axis=1))
    assert len(np.unique(removed[:, 0], axis=0)) == 3, "but every clip has its own"


@pytest.mark.parametrize("side", [2, 4])
def test_a_grid_keeps_one_patch_of_every_cell(side):
    shape, ratio = (8, 2, 4, 8), 1 - 1 / side**2
    mask = draw_mask(jax.random.key(0), "grid", ratio, shape)
    visible = ~np.asarray(mask.removed_mask).reshape(16, 4 // side, side, 8 // side, side)
    assert (visible.sum(axis=(2, 4)) == 1).all()
    same_place = visible[:, :1, :, :1]
    np.testing.assert_array_equal(visible, np.broadcast_to(same_place, visible.shape))
    assert len(np.unique(visible.reshape(16, -1), axis=0)) > 1, "the offset is drawn for each frame"


@pytest.mark.parametrize("side", [12, 24, 48])
@pytest.mark.parametrize(
    ("ratio", "cell"),
    [(0.75, 2), (0.8889, 3), (0.889, 3), (0.888, 3), (8 / 9, 3), (0.9375, 4), (0.9722, 6)],
)
def test_a_rounded_ratio_keeps_one_patch_of_every_cell_too(ratio, cell, side):
    MaskConfig("grid", ratio)
    cells = side // cell
    mask = draw_mask(jax.random.key(0), "grid", ratio, (64, 2, side, side))
    assert mask.kept_ids.shape[-1] == cells**2
    visible = ~np.asarray(mask.removed_mask).reshape(64, 2, cells, cell, cells, cell)
    assert (visible.sum(axis=(3, 5)) == 1).all()


def test_a_grid_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="2x2 cells does not fit 3x4"):
        draw_mask(jax.random.key(0), "grid", 0.75, (1, 1, 3, 4))
    with pytest.raises(ValueError, match="2x2 cells does not fit 4x5"):
        draw_mask(jax.random.key(0), "grid", 0.75, (1, 1, 4, 5))


def test_an_unknown_scheme_is_an_error():
    with pytest.raises(ValueError, match="unknown mask scheme 'blocks'"):
        draw_mask(jax.random.key(0), "blocks", 0.75, SHAPE)


# --- properties

draw_jitted = jax.jit(draw_mask, static_argnums=(1, 2, 3))


@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([("random", 0.65), ("random", 0.95), ("tube", 0.9), ("grid", 0.75)]),
)
def test_kept_and_removed_are_complementary(seed, kind):
    kept_ids, removed = map(np.asarray, draw_jitted(jax.random.key(seed), *kind, SHAPE))
    assert kept_ids.shape == (3, FRAMES, num_keep(PATCHES, kind[1]))
    assert (np.diff(kept_ids, axis=-1) > 0).all(), "ascending, so without repetition"
    visible = np.zeros((3, FRAMES, PATCHES), bool)
    np.put_along_axis(visible, kept_ids, True, axis=-1)
    np.testing.assert_array_equal(removed, ~visible)


@hypothesis.given(st.integers(1, 2000), st.floats(0, 1, exclude_max=True))
def test_counts_are_rounded_down_to_at_least_one(num_patches, ratio):
    kept = num_keep(num_patches, ratio)
    exact = num_patches * (1 - ratio)
    assert 1 <= kept <= num_patches
    assert exact - 1 < kept <= max(exact + 2e-6, 1)
    assert grid_cell(1 - 1 / (1 + num_patches % 40) ** 2) == 1 + num_patches % 40


def test_grid_offsets_are_uniform_and_independent():
    """Of frames, of clips, and of the keys of two steps."""
    shape = (1500, 2, 4, 4)
    masks = [draw_mask(jax.random.key(seed), "grid", 0.75, shape) for seed in (0, 1)]
    first = np.stack([np.asarray(mask.kept_ids)[..., 0] for mask in masks])  # of the first cell
    offsets = first // 4 * 2 + first % 4  # [keys, clips, frames], from 0 to 3
    pairs = {
        "frames": (offsets[:, :, 0], offsets[:, :, 1]),
        "clips": (offsets[:, ::2], offsets[:, 1::2]),
        "keys": (offsets[0], offsets[1]),
    }
    for name, (one, other) in pairs.items():
        counts = np.bincount(4 * one.ravel() + other.ravel(), minlength=16)
        assert stats.chisquare(counts).pvalue > 0.001, name


@pytest.mark.parametrize("scheme", ["random", "tube"])
def test_masks_of_clips_and_keys_are_independent(scheme):
    """A patch stays visible in both of two clips, or of two keys, as often as chance has it."""
    shape = (3000, 2, 2, 4)
    masks = [draw_mask(jax.random.key(seed), scheme, 0.5, shape) for seed in (0, 1)]
    removed = np.stack([np.asarray(mask.removed_mask) for mask in masks])
    pairs = {"clips": (removed[:, ::2, 0], removed[:, 1::2, 0]), "keys": tuple(removed[:, :, 0])}
    if scheme == "random":
        pairs["frames"] = (removed[:, :, 0], removed[:, :, 1])
    for name, (one, other) in pairs.items():
        both = (one & other)[..., 0].ravel()
        assert stats.binomtest(int(both.sum()), len(both), 0.25).pvalue > 0.001, name
