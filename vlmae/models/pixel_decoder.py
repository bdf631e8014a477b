"""Pixel decoder: a light transformer that reconstructs removed patches, frame by frame (MAE)."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from vlmae.config.model import PixelDecoderConfig
from vlmae.models.attention import even_tokens
from vlmae.models.blocks import vit_block
from vlmae.models.embeddings import sincos_positions
from vlmae.models.layers import TOKEN_INIT, VIT_INIT, Compute, Dense, uniform_noise, vit_norm
from vlmae.models.video_encoder import VideoFeatures
from vlmae.ops.masking import num_keep


class PixelPrediction(NamedTuple):
    """Predicted pixels, in the space of the reconstruction target."""

    pixels: Float[Array, "b t s p"]  # float32
    patch_ids: Int[Array, "b t s"]  # the patch that each prediction is for, ascending


class PixelDecoder(nn.Module):
    """Fills the removed patches with a mask token, applies blocks, predicts pixels.

    Attributes:
      config: sizes, and the part of the removed patches that training leaves out.
      grid: rows and columns of patches.
      patch_pixels: values of a patch, 3 * tubelet * patch * patch.
      deterministic: decode every patch.
      full_grid: rows and columns of a picture of full size, which fix the positions; None: `grid`.
    """

    config: PixelDecoderConfig
    grid: tuple[int, int]
    patch_pixels: int
    deterministic: bool = True
    compute: Compute = Compute()
    full_grid: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, video: VideoFeatures) -> PixelPrediction:
        """Predict the pixels of every patch, or in training of a random part of them."""
        config, dtype, num_patches = self.config, self.compute.dtype, video.removed_mask.shape[2]
        dense = functools.partial(Dense, compute=self.compute, kernel_init=VIT_INIT)
        mask_token = self.param("mask_token", TOKEN_INIT, (config.width,))
        positions = sincos_positions(*self.grid, config.width, self.full_grid)
        frames = jnp.concatenate([video.frame_cls[:, :, None], video.tokens], axis=2)
        x = dense(config.width, name="embed")(frames)
        cls, tokens = x[:, :, :1], x[:, :, 1:]
        # Positions are added after the scatter: mask tokens need them most.
        x = scatter_tokens(tokens, video.patch_ids, mask_token, num_patches)
        x = x + jnp.asarray(positions).astype(dtype)
        b, t, _ = video.removed_mask.shape
        patch_ids = jnp.broadcast_to(jnp.arange(num_patches), (b, t, num_patches))
        if not self.deterministic and config.target_ratio > 0:
            # Ints, known before tracing: the number that is decoded fixes the shapes.
            visible = video.stage_patch_ids[0].shape[2]
            count = num_decoded(num_patches, tokens.shape[2], visible, config.target_ratio)
            noise = uniform_noise(self, (b, t, num_patches))
            patch_ids = decoded_patch_ids(noise, video.patch_ids, video.removed_mask, count)
            # Dropped before the blocks, so that targets left out cost nothing.
            x = jnp.take_along_axis(x, patch_ids[..., None], axis=2)
        x = rearrange(jnp.concatenate([cls, x], axis=2), "b t s d -> (b t) s d")
        count = x.shape[1]
        x, lengths = even_tokens(x, self.compute.attention)
        for i in range(config.depth):
            block = vit_block(config.num_heads, 4 * config.width, self.compute, name=f"block_{i}")
            x = block(x, lengths)
        # Without padding, and without [CLS], which only carries context.
        x = vit_norm("norm", dtype)(x[:, 1:count])
        pixels = dense(self.patch_pixels, name="pixels")(x).astype(jnp.float32)
        return PixelPrediction(rearrange(pixels, "(b t) s p -> b t s p", t=t), patch_ids)


def num_decoded(num_patches: int, num_tokens: int, num_visible: int, target_ratio: float) -> int:
    """Count the patches that are decoded: those of the tokens, and a part of the removed ones.

    >>> num_decoded(196, 27, 68, 0.5)
    91
    """
    return min(num_patches, num_tokens + num_keep(num_patches - num_visible, target_ratio))


def decoded_patch_ids(
    noise: Float[Array, "b t n"],
    patch_ids: Int[Array, "b t m"],
    removed_mask: Bool[Array, "b t n"],
    count: int,
) -> Int[Array, "b t s"]:
    """Sample the `count` patches to decode, ascending: those with tokens, then removed by noise.

    A fused token has no patch and is not decoded; one more removed patch takes its slot. Visible
    patches that were pruned come last: their pixels are not in the loss.
    """
    has_token = (patch_ids[..., None] == jnp.arange(noise.shape[-1])).any(axis=2)
    order = jnp.where(has_token, -1.0, jnp.where(removed_mask, noise, 2.0))
    _, chosen = jax.lax.top_k(-order, count)
    return jnp.sort(chosen, axis=-1)


def scatter_tokens(
    tokens: Float[Array, "b t m d"],
    patch_ids: Int[Array, "b t m"],
    mask_token: Float[Array, " d"],
    num_patches: int,
) -> Float[Array, "b t n d"]:
    """Scatter tokens to their patches; every other patch gets the mask token.

    Written as a gather, which XLA shards over the batch; a scatter it does not. The mask token is
    float32 and not among what is gathered: its gradient is a sum over most patches of a batch.
    """
    is_token = patch_ids[:, :, None, :] == jnp.arange(num_patches)[:, None]
    gathered = jnp.take_along_axis(tokens, is_token.argmax(axis=-1)[..., None], axis=2)
    filler = jnp.broadcast_to(mask_token, gathered.shape).astype(tokens.dtype)
    return jnp.where(is_token.any(axis=-1)[..., None], gathered, filler)
