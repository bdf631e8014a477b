"""Attention biases that depend on where two patches stand to each other (BEiT)."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlmae.sparsify import NO_PLACE


class RelativeBias(nn.Module):
    """The tables of an encoder: one for each block, or one that all share.

    Attributes:
      kind: "layer", "shared" or "none".
      num_heads: attention heads.
      grid: rows and columns of patches.
    """

    kind: str
    num_heads: int
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, block: int, places: Int[Array, "f m"]) -> Float[Array, "f h q q"] | None:
        """What is added to a block's logits, [CLS] first; zero at the start, None without any."""
        if self.kind == "none":
            return None
        name = "shared" if self.kind == "shared" else f"block_{block}"
        shape = (num_offsets(*self.grid), self.num_heads)
        table = self.param(name, nn.initializers.zeros, shape)
        return gather_bias(table, self.grid, places)


def num_offsets(rows: int, cols: int) -> int:
    """Entries of a table: every offset of two patches, then [CLS] to patch, patch to [CLS], itself.

    >>> num_offsets(14, 14)
    732
    """
    return (2 * rows - 1) * (2 * cols - 1) + 3


def offset_ids(rows: int, cols: int) -> Int[np.ndarray, "q q"]:
    """The table's entry for each query (rows) and key (columns), [CLS] first (BEiT)."""
    y, x = np.divmod(np.arange(rows * cols), cols)
    dy, dx = y[:, None] - y + rows - 1, x[:, None] - x + cols - 1
    last = num_offsets(rows, cols) - 1
    ids = np.full((rows * cols + 1,) * 2, last, np.int32)
    ids[1:, 1:] = dy * (2 * cols - 1) + dx
    ids[0, 1:], ids[1:, 0] = last - 2, last - 1
    return ids


def gather_bias(
    table: Float[Array, "o h"], grid: tuple[int, int], places: Int[Array, "f m"]
) -> Float[Array, "f h q q"]:
    """The bias between [CLS] and the patches that stand at `places`.

    A fused token stands nowhere: nothing is added to or from it (ours).
    """
    tokens = jnp.pad(places + 1, ((0, 0), (1, 0)))  # [CLS] is 0
    entries = jnp.asarray(offset_ids(*grid))[tokens[:, :, None], tokens[:, None, :]]
    somewhere = jnp.pad(places != NO_PLACE, ((0, 0), (1, 0)), constant_values=True)
    both = somewhere[:, :, None] & somewhere[:, None, :]
    return jnp.where(both[..., None], table[entries], 0.0).transpose(0, 3, 1, 2)
