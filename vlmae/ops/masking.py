"""Masks over the patches of a frame or a clip. Pure functions; a ratio is the fraction removed."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vlmae.ops.grid import grid_cell
from vlmae.ops.registry import Registry


class PatchMask(NamedTuple):
    """Visible and removed patches of each frame."""

    kept_ids: Int[Array, "b t k"]  # the visible patches, ascending
    removed_mask: Bool[Array, "b t n"]  # True where a patch was removed


def num_keep(num_patches: int, ratio: float) -> int:
    """Count the patches that stay visible: at least one, and a static Python int.

    >>> num_keep(196, 0.65), num_keep(1568, 0.9)
    (68, 156)
    """
    # 1e-6, since 10 * (1 - 0.9) is 0.9999999999999998.
    return max(1, math.floor(num_patches * (1 - ratio) + 1e-6))


def mask_from_noise(noise: Float[Array, "b t n"], ratio: float) -> PatchMask:
    """Keep the patches with the lowest noise (MAE, He et al. 2022, section 3).

    The noise comes in as an argument, so that tests and parity checks can fix it.
    """
    keep = num_keep(noise.shape[-1], ratio)
    order = jnp.argsort(noise, axis=-1)
    # The argsort of an argsort is the rank of each patch.
    removed_mask = jnp.argsort(order, axis=-1) >= keep
    return PatchMask(jnp.sort(order[..., :keep], axis=-1), removed_mask)


Shape = tuple[int, int, int, int]  # batch, frames, rows and columns of patches


def random_noise(key: Key[Array, ""], _: float, shape: Shape) -> Float[Array, "b t n"]:
    """Draw noise for each frame alone (MAE)."""
    b, t, rows, cols = shape
    return jax.random.uniform(key, (b, t, rows * cols))


def tube_noise(key: Key[Array, ""], _: float, shape: Shape) -> Float[Array, "b t n"]:
    """Draw noise for each clip and repeat it in all frames (VideoMAE)."""
    b, t, rows, cols = shape
    # Drawn once and broadcast, so that all frames hide the same place (VideoMAE's tubes).
    noise = jax.random.uniform(key, (b, 1, rows * cols))
    return jnp.broadcast_to(noise, (b, t, rows * cols))


def grid_noise(key: Key[Array, ""], ratio: float, shape: Shape) -> Float[Array, "b t n"]:
    """Lower the noise of one patch in every cell of `grid_cell(ratio)` (MAE's grid).

    The offset in the cell is random for each frame (ours).

    Raises:
      ValueError: cells of this size do not divide rows and columns.
    """
    b, t, rows, cols = shape
    cell = grid_cell(ratio)
    if rows % cell or cols % cell:
        raise ValueError(f"grid masking by {cell}x{cell} cells does not fit {rows}x{cols}")
    # MAE's grid is fixed; with one offset for all frames a patch would never be seen in a clip.
    offset = jax.random.randint(key, (b, t, 1, 1), 0, cell * cell)
    phase = (jnp.arange(rows)[:, None] % cell) * cell + jnp.arange(cols)[None, :] % cell
    return (phase != offset).astype(jnp.float32).reshape(b, t, rows * cols)


class MaskScheme(NamedTuple):
    """A way to draw masks."""

    noise: Callable[[Key[Array, ""], float, Shape], Float[Array, "b t n"]]
    is_per_clip: bool  # all frames of a clip have one mask
    exact_ratio: Callable[[float], float] = lambda ratio: ratio  # of the masks at a given ratio


SCHEMES = Registry(
    "mask scheme",
    {
        # `is_per_clip` lets attention over time run within equal patches, which is far cheaper.
        "random": MaskScheme(random_noise, is_per_clip=False),
        "tube": MaskScheme(tube_noise, is_per_clip=True),
        # The cell fixes the number of patches; that of a rounded ratio would miss some cells.
        "grid": MaskScheme(grid_noise, False, lambda ratio: 1 - 1 / grid_cell(ratio) ** 2),
    },
)


def draw_mask(key: Key[Array, ""], scheme: str, ratio: float, shape: Shape) -> PatchMask:
    """Draw a mask of the given scheme.

    Args:
      key: random key.
      scheme: one of `SCHEMES`.
      ratio: fraction removed; the grid scheme rounds it to the next one of a whole cell.
      shape: batch, frames, rows and columns of patches.

    Raises:
      ValueError: the scheme is unknown, or does not fit the ratio and the grid of patches.
    """
    kind = SCHEMES[scheme]
    return mask_from_noise(kind.noise(key, ratio, shape), kind.exact_ratio(ratio))
