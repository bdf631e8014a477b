"""From pixels and word ids to tokens: patches, positions, BERT embeddings."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from vlmae.model_config import VitLayout
from vlmae.models.layers import BERT_EPS, TOKEN_INIT, dot_rows


def normalize_pixels(video: Array, layout: VitLayout) -> Float[Array, "*b 3"]:
    """uint8 RGB in [0, 255] to float32, less the layout's mean, over its standard deviation."""
    scaled = video.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(layout.pixel_mean)) / jnp.asarray(layout.pixel_std)


def denormalize_pixels(pixels: np.ndarray, layout: VitLayout) -> np.ndarray:
    """The inverse of `normalize_pixels`, clipped and rounded to uint8 (NumPy)."""
    scaled = (pixels * np.asarray(layout.pixel_std) + np.asarray(layout.pixel_mean)) * 255.0
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def patchify(
    video: Float[Array, "b f h w 3"], patch_size: int, tubelet: int = 1
) -> Float[Array, "b t n p"]:
    """Cuts clips into square patches over `tubelet` frames, row by row.

    The pixels of a patch are ordered (frame, y, x, rgb). A single image is repeated to a tubelet.

    Raises:
      ValueError: height or width is not a multiple of the patch size, or the frames are none of
        the tubelet.
    """
    frames, height, width = video.shape[1:4]
    if height % patch_size or width % patch_size:
        raise ValueError(f"frames of {height}x{width} do not divide into patches of {patch_size}")
    if frames == 1:
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
    """The inverse of `patchify` for [b t n p] and `rows` rows of patches (NumPy)."""
    return rearrange(
        patches,
        "b t (y x) (f p q c) -> b (t f) (y p) (x q) c",
        y=rows,
        f=tubelet,
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


def sincos_clip_positions(num_places: int, width: int) -> Float[np.ndarray, "n d"]:
    """Fixed 1-D sine-cosine positions; even channels are sines, odd ones cosines (VideoMAE)."""
    channel = np.arange(width)
    frequencies = 1.0 / 10000 ** (2 * (channel // 2) / width)
    angles = np.arange(num_places)[:, None] * frequencies
    return np.where(channel % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


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
        return dot_rows(x.astype(self.dtype), self.word.embedding.T.astype(self.dtype))
