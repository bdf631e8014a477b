"""The light transformer that paints the removed patches (MAE's decoder, frame by frame)."""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vlmae.model_config import PixelDecoderConfig
from vlmae.models.embeddings import sincos_positions
from vlmae.models.layers import BERT_INIT, VIT_INIT, vit_block
from vlmae.models.video_encoder import VideoFeatures


class PixelDecoder(nn.Module):
    """Tokens go to their places, a learned mask token to all others; then blocks, then pixels.

    Attributes:
      config: sizes.
      grid: rows and columns of patches.
      patch_pixels: values of a patch, 3 * patch * patch.
      remat, dtype, attention: see `ModelConfig`.
    """

    config: PixelDecoderConfig
    grid: tuple[int, int]
    patch_pixels: int
    remat: bool = False
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(self, video: VideoFeatures) -> Float[Array, "b t n p"]:
        """Predicted pixels of every patch, in the space of the reconstruction target, float32."""
        width = self.config.width

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=VIT_INIT, name=name)

        mask_token = self.param("mask_token", BERT_INIT, (width,)).astype(self.dtype)
        positions = jnp.asarray(sincos_positions(*self.grid, width)).astype(self.dtype)
        x = dense(width, "embed")(jnp.concatenate([video.frame_cls[:, :, None], video.tokens], 2))
        cls, tokens = x[:, :, :1], x[:, :, 1:]
        tokens = scatter_tokens(tokens, video.places, mask_token, len(positions)) + positions
        x = rearrange(jnp.concatenate([cls, tokens], axis=2), "b t n d -> (b t) n d")
        for i in range(self.config.depth):
            x = vit_block(
                self.config.num_heads,
                4 * width,
                f"block_{i}",
                remat=self.remat,
                dtype=self.dtype,
                attention=self.attention,
            )(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x[:, 1:])
        pixels = dense(self.patch_pixels, "pixels")(x).astype(jnp.float32)
        return rearrange(pixels, "(b t) n p -> b t n p", b=video.tokens.shape[0])


def scatter_tokens(
    tokens: Float[Array, "b t m d"],
    places: Int[Array, "b t m"],
    mask_token: Float[Array, " d"],
    num_places: int,
) -> Float[Array, "b t n d"]:
    """Puts tokens at their places among `num_places`; every other place holds the mask token.

    Written as a gather from [tokens, mask token], which shards over the batch; a scatter does not.
    """
    b, t, m, width = tokens.shape
    here = places[:, :, None, :] == jnp.arange(num_places)[:, None]
    source = jnp.where(here.any(axis=-1), here.argmax(axis=-1), m)
    filler = jnp.broadcast_to(mask_token, (b, t, 1, width))
    return jnp.take_along_axis(jnp.concatenate([tokens, filler], 2), source[..., None], axis=2)
