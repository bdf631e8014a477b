"""The light transformer that paints the removed patches (MAE's decoder, frame by frame)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from vlmae.masking import num_keep
from vlmae.model_config import PixelDecoderConfig, Remat
from vlmae.models.embeddings import sincos_positions
from vlmae.models.layers import (
    TOKEN_INIT,
    VIT_INIT,
    Dense,
    uniform_noise,
    vit_block,
    vit_norm,
)
from vlmae.models.video_encoder import VideoFeatures


class Painted(NamedTuple):
    """Predicted pixels, in the space of the reconstruction target."""

    pixels: Float[Array, "b t s p"]  # float32
    places: Int[Array, "b t s"]  # the patch that each prediction is for, ascending


class PixelDecoder(nn.Module):
    """Tokens go to their places, a learned mask token to all others; then blocks, then pixels.

    Attributes:
      config: sizes, and how many of the removed patches training leaves out.
      grid: rows and columns of patches.
      patch_pixels: values of a patch, 3 * patch * patch.
      deterministic: decode every patch.
      remat, dtype, attention: see `ModelConfig`.
    """

    config: PixelDecoderConfig
    grid: tuple[int, int]
    patch_pixels: int
    deterministic: bool = True
    remat: Remat = "none"
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(self, video: VideoFeatures) -> Painted:
        """Paints every patch of every frame, or in training a random part of them."""
        width, num_places = self.config.width, video.removed_mask.shape[2]

        def dense(features: int, name: str) -> nn.Dense:
            return Dense(features, dtype=self.dtype, kernel_init=VIT_INIT, name=name)

        mask_token = self.param("mask_token", TOKEN_INIT, (width,)).astype(self.dtype)
        positions = jnp.asarray(sincos_positions(*self.grid, width)).astype(self.dtype)
        x = dense(width, "embed")(jnp.concatenate([video.frame_cls[:, :, None], video.tokens], 2))
        cls, tokens = x[:, :, :1], x[:, :, 1:]
        x = scatter_tokens(tokens, video.places, mask_token, num_places) + positions
        places = self._places(video)
        if places.shape[2] < num_places:
            x = jnp.take_along_axis(x, places[..., None], axis=2)
        x = rearrange(jnp.concatenate([cls, x], axis=2), "b t s d -> (b t) s d")
        for i in range(self.config.depth):
            x = vit_block(
                self.config.num_heads,
                4 * width,
                f"block_{i}",
                remat=self.remat,
                dtype=self.dtype,
                attention=self.attention,
            )(x)
        x = vit_norm("norm", self.dtype)(x[:, 1:])
        pixels = dense(self.patch_pixels, "pixels")(x).astype(jnp.float32)
        return Painted(rearrange(pixels, "(b t) s p -> b t s p", t=places.shape[1]), places)

    def _places(self, video: VideoFeatures) -> Int[Array, "b t s"]:
        b, t, n = video.removed_mask.shape
        if self.deterministic or self.config.target_ratio == 0:
            return jnp.broadcast_to(jnp.arange(n), (b, t, n))
        count = num_decoded(
            n, video.places.shape[2], video.stage_places[0].shape[2], self.config.target_ratio
        )
        noise = uniform_noise(self, (b, t, n))
        return decoded_places(noise, video.places, video.removed_mask, count)


def num_decoded(num_patches: int, num_tokens: int, num_visible: int, target_ratio: float) -> int:
    """Places that the decoder works on: the tokens', and a part of the removed patches.

    >>> num_decoded(196, 27, 68, 0.5)
    91
    """
    return min(num_patches, num_tokens + num_keep(num_patches - num_visible, target_ratio))


def decoded_places(
    noise: Float[Array, "b t n"],
    places: Int[Array, "b t m"],
    removed_mask: Bool[Array, "b t n"],
    count: int,
) -> Int[Array, "b t s"]:
    """The `count` places to decode, ascending: where tokens stand, then removed patches by noise.

    A fused token stands nowhere and is not decoded: one more removed patch takes its slot.
    """
    occupied = (places[..., None] == jnp.arange(noise.shape[-1])).any(axis=2)
    order = jnp.where(occupied, -1.0, jnp.where(removed_mask, noise, 2.0))
    _, chosen = jax.lax.top_k(-order, count)
    return jnp.sort(chosen, axis=-1)


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
