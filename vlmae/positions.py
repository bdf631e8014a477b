"""Learned positions for another number of patches, frames or words. Pure functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def fit_positions(
    name: str, source: Float[Array | np.ndarray, "..."], initial: Float[Array | np.ndarray, "..."]
) -> Float[Array, "m d"] | None:
    """The table of parameter `name`, as long as its initial value; None if it holds no positions.

    Patches are interpolated in the square grid (bicubic), their offsets linearly, frames in time
    (linear). Words keep their
    positions: those beyond the source's longest text keep their initial values.
    """
    if initial.ndim != 2 or source.shape[1:] != initial.shape[1:]:
        return None
    if name == "text_encoder/embeddings/position/embedding":
        common = min(len(source), len(initial))
        return jnp.asarray(initial).at[:common].set(source[:common])
    if name == "video_encoder/temporal/embedding":
        return jax.image.resize(source, initial.shape, "linear")
    if name == "video_encoder/positions":
        return resize_grid(source, len(initial))
    if name.startswith("video_encoder/relative_bias/"):
        return resize_offsets(source, len(initial))
    return None


def resize_grid(source: Float[Array | np.ndarray, "n d"], count: int) -> Float[Array, "m d"] | None:
    """Positions of a square grid of patches, interpolated so that `count` rows remain.

    Rows before the grid ([CLS] and others: what is left over a square) stay as they are. None if
    `count` does not leave a square with as many of them.
    """
    old, new = math.isqrt(len(source)), math.isqrt(count)
    prefix = len(source) - old**2
    if count - new**2 != prefix:
        return None
    rows = bicubic_matrix(old, new)
    grid = jnp.reshape(source[prefix:], (old, old, -1))
    resized = jnp.einsum("yr,xc,rcd->yxd", rows, rows, grid, precision="highest")
    return jnp.concatenate([source[:prefix], resized.reshape(new**2, -1)])


def resize_offsets(source: Float[Array | np.ndarray, "n h"], count: int) -> Float[Array, "m h"]:
    """A table of relative biases for another square grid: offsets interpolated linearly (BEiT).

    The last three entries, of [CLS], stay as they are.
    """
    old, new = math.isqrt(len(source) - 3), math.isqrt(count - 3)
    grid = jnp.reshape(source[:-3], (old, old, -1))
    resized = jax.image.resize(grid, (new, new, grid.shape[2]), "linear", antialias=False)
    return jnp.concatenate([resized.reshape(new**2, -1), source[-3:]])


def bicubic_matrix(old: int, new: int) -> Float[np.ndarray, "m n"]:
    """Weights of `old` samples in each of `new` ones: cubic convolution with a = -0.75.

    Half-pixel centers, borders repeated, no antialiasing: what PyTorch's `interpolate` does, by
    which the published models resize their positions. (`jax.image.resize` has a = -0.5.)
    """
    a = -0.75
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centers).astype(int)[:, None] + np.arange(-1, 3)
    x = np.abs(centers[:, None] - taps)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.zeros((new, old), np.float32)
    np.add.at(
        weights, (np.arange(new)[:, None], taps.clip(0, old - 1)), np.where(x <= 1, near, far)
    )
    return weights
