"""Pixels to patches; positions: fixed, resized, or as biases; BERT's embeddings of tokens."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from vlmae.config.model import TextEncoderConfig, VitLayout
from vlmae.models.layers import TOKEN_INIT, Compute, dot_tables
from vlmae.ops.registry import Registry
from vlmae.ops.token_pruning import NO_PATCH
from vlmae.parallel.sharding import copy_to_shards


def normalize_pixels(video: Array, layout: VitLayout) -> Float[Array, "*b 3"]:
    """Normalize uint8 RGB to float32: in [0, 1], less the layout's mean, over its deviation."""
    # On the device: uint8 crosses the bus, a quarter of the bytes of float32.
    scaled = video.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(layout.pixel_mean)) / jnp.asarray(layout.pixel_std)


def denormalize_pixels(pixels: np.ndarray, layout: VitLayout) -> np.ndarray:
    """Invert `normalize_pixels`, clipped and rounded to uint8 (NumPy)."""
    scaled = (pixels * np.asarray(layout.pixel_std) + np.asarray(layout.pixel_mean)) * 255.0
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def patchify(
    video: Float[Array, "b f h w 3"], patch_size: int, tubelet: int = 1
) -> Float[Array, "b t n p"]:
    """Cut clips into square patches over `tubelet` frames, row by row.

    The pixels of a patch are ordered (frame, y, x, rgb). A single image is repeated to a tubelet.

    Raises:
      ValueError: height or width is not a multiple of the patch size, or the number of frames not
        one of the tubelet.
    """
    frames, height, width = video.shape[1:4]
    if height % patch_size or width % patch_size:
        raise ValueError(f"frames of {height}x{width} do not divide into patches of {patch_size}")
    if frames == 1:
        # A still image is a clip without motion.
        video = jnp.repeat(video, tubelet, axis=1)
    elif frames % tubelet:
        raise ValueError(f"clips of {frames} frames do not divide into tubelets of {tubelet}")
    return rearrange(
        video,
        "b (t f) (y p) (x q) c -> b t (y x) (f p q c)",
        f=tubelet,
        p=patch_size,
        q=patch_size,
    )


def unpatchify(patches: np.ndarray, patch_size: int, rows: int, tubelet: int = 1) -> np.ndarray:
    """Invert `patchify` for [b t n p] and `rows` rows of patches (NumPy)."""
    return rearrange(
        patches,
        "b t (y x) (f p q c) -> b (t f) (y p) (x q) c",
        y=rows,
        f=tubelet,
        p=patch_size,
        q=patch_size,
    )


def sincos_positions(
    rows: int, cols: int, width: int, full: tuple[int, int] | None = None
) -> Float[np.ndarray, "n d"]:
    """Compute fixed 2-D sine-cosine positions: half of the channels encode x, half y (MAE).

    A patch has the position of its center in the grid `full` of the same picture, so that a place
    keeps its position when pictures are smaller; None: the grid is `full` itself.

    Raises:
      ValueError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, not {width}")
    # In float64 and NumPy: the table is a constant of the program, and equal on every device.
    frequencies = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    y, x = np.mgrid[:rows, :cols].reshape(2, -1).astype(np.float64)
    if full is not None:
        y, x = ((i + 0.5) * f / n - 0.5 for i, f, n in zip((y, x), full, (rows, cols), strict=True))

    def encode(position: np.ndarray) -> np.ndarray:
        angles = position[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([encode(x), encode(y)], axis=1).astype(np.float32)


def sincos_clip_positions(count: int, width: int) -> Float[np.ndarray, "n d"]:
    """Compute `count` fixed 1-D positions: even channels sines, odd ones cosines (VideoMAE)."""
    channel = np.arange(width)
    # Pairs of channels share a frequency, in VideoMAE's order, not MAE's halves.
    frequencies = 1.0 / 10000 ** (2 * (channel // 2) / width)
    angles = np.arange(count)[:, None] * frequencies
    return np.where(channel % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


def resize_grid(source: Float[Array | np.ndarray, "n d"], count: int) -> Float[Array, "m d"] | None:
    """Interpolate the positions of a square grid of patches, so that `count` rows result.

    Rows before the grid ([CLS] and extra tokens: the excess over a square) stay as they are.

    Returns:
      The resized table, or None if `count` less those rows is no square.
    """
    old, new = math.isqrt(len(source)), math.isqrt(count)
    prefix = len(source) - old**2
    if count - new**2 != prefix:
        return None
    rows = bicubic_matrix(old, new)
    grid = jnp.reshape(source[prefix:], (old, old, -1))
    # Accelerators multiply float32 in fewer bits unless they are told not to.
    resized = jnp.einsum("yr,xc,rcd->yxd", rows, rows, grid, precision="highest")
    return jnp.concatenate([source[:prefix], resized.reshape(new**2, -1)])


def resize_offsets(source: Float[Array | np.ndarray, "n h"], count: int) -> Float[Array, "m h"]:
    """Interpolate relative biases linearly over the offsets of another square grid (BEiT).

    The last three entries, those of [CLS], stay as they are.
    """
    old, new = math.isqrt(len(source) - 3), math.isqrt(count - 3)
    grid = jnp.reshape(source[:-3], (old, old, -1))
    resized = jax.image.resize(grid, (new, new, grid.shape[2]), "linear", antialias=False)
    return jnp.concatenate([resized.reshape(new**2, -1), source[-3:]])


def bicubic_matrix(old: int, new: int) -> Float[np.ndarray, "m n"]:
    """Compute the weights of `old` samples in each of `new`: cubic convolution with a = -0.75.

    Half-pixel centers, borders repeated, no antialiasing, as in PyTorch's `interpolate`, by which
    the published models resize their positions. (`jax.image.resize` has a = -0.5.)
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


TABLES: Registry[str] = Registry(
    "relative bias", {"layer": "block_{block}", "shared": "shared"}
)  # kind -> name of a block's table


class RelativeBias(nn.Module):
    """Attention biases by the offset of two patches of a frame (BEiT).

    A table for each block, or one that all blocks share.

    Attributes:
      kind: one of `TABLES`, or "none".
      num_heads: attention heads.
      grid: rows and columns of patches.
    """

    kind: str
    num_heads: int
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, block: int, patch_ids: Int[Array, "f m"]) -> Float[Array, "f h q q"] | None:
        """Return the bias of a block's logits, [CLS] first; None for the kind "none".

        Args:
          block: number of the block, from 0.
          patch_ids: patches of the frame's tokens, [CLS] not among them.
        """
        if self.kind == "none":
            return None
        # Zeros as in BEiT: at the start attention knows no positions from here.
        shape = (num_offsets(*self.grid), self.num_heads)
        name = TABLES[self.kind].format(block=block)
        table = self.param(name, nn.initializers.zeros, shape)
        return gather_bias(table, self.grid, patch_ids)


def num_offsets(rows: int, cols: int) -> int:
    """Count the entries of a table: all offsets of two patches, then three that involve [CLS].

    Those are [CLS] to patch, patch to [CLS], and [CLS] to itself.

    >>> num_offsets(14, 14)
    732
    """
    return (2 * rows - 1) * (2 * cols - 1) + 3


def offset_ids(rows: int, cols: int) -> Int[np.ndarray, "q q"]:
    """Compute the table's entry for each query (rows) and key (columns), [CLS] first (BEiT)."""
    y, x = np.divmod(np.arange(rows * cols), cols)
    dy, dx = y[:, None] - y + rows - 1, x[:, None] - x + cols - 1
    # The order of BEiT's own table, so that its weights are read as they are.
    last = num_offsets(rows, cols) - 1
    ids = np.full((rows * cols + 1,) * 2, last, np.int32)
    ids[1:, 1:] = dy * (2 * cols - 1) + dx
    ids[0, 1:], ids[1:, 0] = last - 2, last - 1
    return ids


def gather_bias(
    table: Float[Array, "o h"], grid: tuple[int, int], patch_ids: Int[Array, "f m"]
) -> Float[Array, "f h q q"]:
    """Gather the biases between [CLS] and the patches `patch_ids`.

    A fused token is no patch: its biases are zero (ours).
    """
    # Pruned or masked tokens must take the entries of their own patches, not of their slots.
    tokens = jnp.pad(patch_ids + 1, ((0, 0), (1, 0)))  # [CLS] is 0
    entries = jnp.asarray(offset_ids(*grid))[tokens[:, :, None], tokens[:, None, :]]
    is_patch = jnp.pad(patch_ids != NO_PATCH, ((0, 0), (1, 0)), constant_values=True)
    both = is_patch[:, :, None] & is_patch[:, None, :]
    return jnp.where(both[..., None], table[entries], 0.0).transpose(0, 3, 1, 2)


class BertEmbeddings(nn.Module):
    """Word, position and token-type embeddings, layer norm, dropout (BERT).

    CLIP's have neither token types nor a norm.

    Tables are read and their gradients summed in float32, on every device apart; what devices then
    sum has the type `compute.gradient_dtype`. A gradient that is summed row by row in bfloat16, as
    GPUs do, loses up to half of a word that occurs thousands of times.

    Attributes:
      config: sizes of the tables, dropout.
      deterministic: no dropout.
      compute: type of the activations, and of the sums over devices.
      pre_norm: CLIP's, for blocks that normalize their input themselves.
    """

    config: TextEncoderConfig
    deterministic: bool = True
    compute: Compute = Compute()
    pre_norm: bool = False

    def setup(self) -> None:
        """Make the tables, the norm and the dropout."""
        config, dtype = self.config, self.compute.dtype
        table = functools.partial(nn.Embed, features=config.width, embedding_init=TOKEN_INIT)
        self.word = table(config.vocab_size)
        self.position = table(config.max_len)
        if not self.pre_norm:
            self.token_type = table(2)
            self.norm = nn.LayerNorm(epsilon=config.layout.eps, dtype=dtype)
        self.drop = nn.Dropout(config.dropout, deterministic=self.deterministic)
        # Once for all that read the table: the gradients of words and logits are then summed on
        # each device first, and cross the network together.
        sums = self.compute.gradient_dtype if dtype != "float32" else "float32"
        self.tables = copy_to_shards(jnp.asarray(self.word.embedding), sums)

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Embed token ids, all of token type 0, at positions 0, 1, ..."""
        words = self._by_shard(jax.vmap(lambda table, ids: jnp.take(table, ids, axis=0)), ids)
        # Slices, since lookups would scatter their gradients.
        x = words + self.position.embedding[: ids.shape[1]]
        if self.pre_norm:
            return self.drop(x.astype(self.compute.dtype))
        # Token types stay in the model, though all are 0: BERT's weights load exactly.
        return self.drop(self.norm(x + self.token_type.embedding[0]))

    def attend(self, x: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Multiply by the word table: float32 logits of every token, with tied weights."""
        x = x.astype(self.compute.dtype)
        return self._by_shard(lambda tables, x: dot_tables(x, tables), x)

    def _by_shard(self, function: Callable[[Array, Array], Array], x: Array) -> Array:
        """Apply function(tables [s v d], rows [s r ...]), each shard of the rows to its table."""
        tables, rows = self.tables, x.shape[0]
        if rows % len(tables):  # the mesh does not divide them
            tables = self.word.embedding[None]
        out = function(tables, x.reshape(len(tables), rows // len(tables), *x.shape[1:]))
        return out.reshape(rows, *out.shape[2:])
