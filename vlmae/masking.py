"""Masks over the patches of a frame or a clip. Pure functions; a ratio is the fraction removed."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class PatchMask(NamedTuple):
    """Which patches of each frame stay visible."""

    kept_ids: Int[Array, "b t k"]  # places of the visible patches, ascending
    removed_mask: Bool[Array, "b t n"]  # True where a patch was removed


def num_keep(num_patches: int, ratio: float) -> int:
    """Patches that stay visible: at least one, and a static Python int.

    >>> num_keep(196, 0.65), num_keep(1568, 0.9)
    (68, 156)
    """
    return max(1, math.floor(num_patches * (1 - ratio) + 1e-6))


def mask_from_noise(noise: Float[Array, "b t n"], ratio: float) -> PatchMask:
    """Keeps the patches with the lowest noise (MAE, He et al. 2022, section 3).

    The noise comes in as an argument, so that tests and parity checks can fix it.
    """
    keep = num_keep(noise.shape[-1], ratio)
    order = jnp.argsort(noise, axis=-1)
    removed_mask = jnp.argsort(order, axis=-1) >= keep
    return PatchMask(jnp.sort(order[..., :keep], axis=-1), removed_mask)


def mask_noise(
    key: Key[Array, ""], scheme: str, ratio: float, shape: tuple[int, int, int, int]
) -> Float[Array, "b t n"]:
    """Noise that makes `mask_from_noise` draw a mask of the given scheme.

    Args:
      key: random key.
      scheme: "random" (each frame alone), "tube" (one mask for all frames, VideoMAE) or "grid"
        (one visible patch in every s x s cell, MAE's grid sampling; the offset within the cell is
        random for each frame, ours).
      ratio: fraction removed; for "grid" it is 1 - 1/s^2.
      shape: batch, frames, rows and columns of patches.

    Raises:
      ValueError: an unknown scheme, or rows and columns that the grid's cells do not divide.
    """
    b, t, rows, cols = shape
    if scheme == "random":
        return jax.random.uniform(key, (b, t, rows * cols))
    if scheme == "tube":
        noise = jax.random.uniform(key, (b, 1, rows * cols))
        return jnp.broadcast_to(noise, (b, t, rows * cols))
    if scheme == "grid":
        cell = round(1 / math.sqrt(1 - ratio))
        if rows % cell or cols % cell:
            raise ValueError(f"grid masking by {cell}x{cell} cells does not fit {rows}x{cols}")
        offset = jax.random.randint(key, (b, t, 1, 1), 0, cell * cell)
        phase = (jnp.arange(rows)[:, None] % cell) * cell + jnp.arange(cols)[None, :] % cell
        return (phase != offset).astype(jnp.float32).reshape(b, t, rows * cols)
    raise ValueError(f"unknown mask scheme {scheme!r}")
