"""From pixels and word ids to tokens: patches, positions, BERT embeddings."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from vlmae.models.layers import BERT_EPS, TOKEN_INIT

# Mean and standard deviation of ImageNet's RGB channels in [0, 1], as MAE normalizes its input.
RGB_MEAN = (0.485, 0.456, 0.406)
RGB_STD = (0.229, 0.224, 0.225)


def normalize_pixels(video: Array) -> Float[Array, "*b 3"]:
    """uint8 RGB to zero mean and unit variance, float32."""
    scaled = video.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(RGB_MEAN)) / jnp.asarray(RGB_STD)


def denormalize_pixels(pixels: np.ndarray) -> np.ndarray:
    """The inverse of `normalize_pixels`, clipped and rounded to uint8 (NumPy)."""
    scaled = (pixels * np.asarray(RGB_STD) + np.asarray(RGB_MEAN)) * 255.0
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def patchify(video: Float[Array, "b t h w 3"], patch_size: int) -> Float[Array, "b t n p"]:
    """Cuts frames into square patches, row by row; the pixels of a patch are ordered (y, x, rgb).

    Raises:
      ValueError: height or width is not a multiple of the patch size.
    """
    height, width = video.shape[2:4]
    if height % patch_size or width % patch_size:
        raise ValueError(f"frames of {height}x{width} do not divide into patches of {patch_size}")
    return rearrange(video, "b t (y p) (x q) c -> b t (y x) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: np.ndarray, patch_size: int, rows: int) -> np.ndarray:
    """The inverse of `patchify` for [b t n p] and `rows` rows of patches (NumPy)."""
    return rearrange(
        patches,
        "b t (y x) (p q c) -> b t (y p) (x q) c",
        y=rows,
        p=patch_size,
        q=patch_size,
    )


def sincos_positions(rows: int, cols: int, width: int) -> Float[np.ndarray, "n d"]:
    """Fixed 2-D sine-cosine positions: half of the channels encode x, half y (MAE).

    Raises:
      ValueError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, not {width}")
    frequencies = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    y, x = np.mgrid[:rows, :cols].reshape(2, -1).astype(np.float64)

    def encode(position: np.ndarray) -> np.ndarray:
        angles = position[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([encode(x), encode(y)], axis=1).astype(np.float32)


class BertEmbeddings(nn.Module):
    """Word + position + token-type embeddings, layer norm, dropout (BERT).

    Attributes:
      vocab_size, max_len, width: sizes of the tables.
    """

    vocab_size: int
    max_len: int
    width: int
    dropout: float = 0.0
    deterministic: bool = True
    dtype: str = "float32"

    def setup(self):
        def table(size: int) -> nn.Embed:
            return nn.Embed(size, self.width, embedding_init=TOKEN_INIT, dtype=self.dtype)

        self.word = table(self.vocab_size)
        self.position = table(self.max_len)
        self.token_type = table(2)
        self.norm = nn.LayerNorm(epsilon=BERT_EPS, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout, deterministic=self.deterministic)

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        positions = self.position(jnp.arange(ids.shape[1]))
        types = self.token_type(jnp.zeros_like(ids))
        return self.drop(self.norm(self.word(ids) + positions + types))

    def attend(self, x: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Scores of every word: the product with the word table (tied weights)."""
        return self.word.attend(x)
