"""Visual masks: counts, complements, and what each scheme promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmae.masking import mask_from_noise, mask_noise, num_keep

SHAPE = (3, 4, 4, 6)  # clips, frames, rows and columns of patches
FRAMES, PATCHES = 4, 24


def draw(scheme: str, ratio: float, seed: int = 0):
    return mask_from_noise(mask_noise(jax.random.key(seed), scheme, ratio, SHAPE), ratio)


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


@pytest.mark.parametrize(
    ("scheme", "ratio"), [("random", 0.65), ("tube", 0.65), ("grid", 0.75), ("random", 0.0)]
)
def test_kept_and_removed_are_complementary(scheme, ratio):
    kept_ids, removed = map(np.asarray, draw(scheme, ratio))
    keep = num_keep(PATCHES, ratio)
    assert kept_ids.shape == (3, FRAMES, keep)
    assert (np.diff(kept_ids, axis=-1) > 0).all(), "ascending, so without repetition"
    visible = np.zeros((3, FRAMES, PATCHES), bool)
    np.put_along_axis(visible, kept_ids, True, axis=-1)
    np.testing.assert_array_equal(removed, ~visible)


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
    noise = mask_noise(jax.random.key(0), "random", 0.65, (2000, 1, 4, 6))
    frequency = np.asarray(mask_from_noise(noise, 0.65).removed_mask).mean(axis=(0, 1))
    np.testing.assert_allclose(frequency, 1 - 8 / 24, atol=0.05)  # 4.7 standard deviations


def test_a_tube_is_one_mask_for_all_frames_of_a_clip():
    removed = np.asarray(draw("tube", 0.65).removed_mask)
    np.testing.assert_array_equal(removed, np.repeat(removed[:, :1], FRAMES, axis=1))
    assert len(np.unique(removed[:, 0], axis=0)) == 3, "but every clip has its own"


@pytest.mark.parametrize("side", [2, 4])
def test_a_grid_keeps_one_patch_of_every_cell(side):
    shape, ratio = (8, 2, 4, 8), 1 - 1 / side**2
    mask = mask_from_noise(mask_noise(jax.random.key(0), "grid", ratio, shape), ratio)
    visible = ~np.asarray(mask.removed_mask).reshape(16, 4 // side, side, 8 // side, side)
    assert (visible.sum(axis=(2, 4)) == 1).all()
    same_place = visible[:, :1, :, :1]
    np.testing.assert_array_equal(visible, np.broadcast_to(same_place, visible.shape))
    assert len(np.unique(visible.reshape(16, -1), axis=0)) > 1, "the offset is drawn for each frame"


def test_a_grid_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="2x2 cells does not fit 3x4"):
        mask_noise(jax.random.key(0), "grid", 0.75, (1, 1, 3, 4))
    with pytest.raises(ValueError, match="2x2 cells does not fit 4x5"):
        mask_noise(jax.random.key(0), "grid", 0.75, (1, 1, 4, 5))


def test_an_unknown_scheme_is_an_error():
    with pytest.raises(ValueError, match="unknown mask scheme 'blocks'"):
        mask_noise(jax.random.key(0), "blocks", 0.75, SHAPE)
