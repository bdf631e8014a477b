"""Frames in, visible tokens out: a ViT that encodes every frame alone (SMAUG, video encoder)."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int

from vlmae.masking import PatchMask
from vlmae.model_config import VideoEncoderConfig
from vlmae.models.embeddings import sincos_positions
from vlmae.models.layers import BERT_INIT, VIT_INIT, vit_block


class VideoFeatures(NamedTuple):
    """What leaves the video encoder."""

    tokens: Float[Array, "b t m d"]  # patch tokens, [CLS] not among them
    frame_cls: Float[Array, "b t d"]
    places: Int[Array, "b t m"]  # patch of the frame at which each token stands
    removed_mask: Bool[Array, "b t n"]  # True where a patch was masked before the encoder


class VideoEncoder(nn.Module):
    """A ViT over the visible patches of each frame; batch and time are folded.

    Attributes:
      config: sizes.
      grid: rows and columns of patches, which fix the positions.
      remat, dtype, attention: see `ModelConfig`.
    """

    config: VideoEncoderConfig
    grid: tuple[int, int]
    remat: bool = False
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, patches: Float[Array, "b t n p"], mask: PatchMask | None = None
    ) -> VideoFeatures:
        """Encodes the patches that `mask` keeps; without a mask, all of them.

        The others are dropped before the first matrix product, so they cost nothing and get no
        gradient.
        """
        width, (b, t, n, _) = self.config.width, patches.shape
        if mask is None:
            kept_ids = jnp.broadcast_to(jnp.arange(n), (b, t, n))
            removed_mask = jnp.zeros((b, t, n), bool)
        else:
            kept_ids, removed_mask = mask
            patches = jnp.take_along_axis(patches, kept_ids[..., None], axis=2)

        embed = nn.Dense(width, dtype=self.dtype, kernel_init=VIT_INIT, name="patch_embed")
        x = embed(patches) + self._positions()[kept_ids].astype(self.dtype)
        cls = self.param("cls", BERT_INIT, (width,))
        cls = repeat(cls.astype(self.dtype), "d -> f 1 d", f=b * t)
        x = jnp.concatenate([cls, rearrange(x, "b t k d -> (b t) k d")], axis=1)
        for i in range(self.config.depth):
            x = vit_block(
                self.config.num_heads,
                self.config.mlp_dim,
                f"block_{i}",
                remat=self.remat,
                dtype=self.dtype,
                attention=self.attention,
            )(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        x = rearrange(x, "(b t) m d -> b t m d", t=t)
        return VideoFeatures(x[:, :, 1:], x[:, :, 0], kept_ids, removed_mask)

    def _positions(self) -> Float[Array, "n d"]:
        rows, cols = self.grid
        if self.config.positions == "learned":
            return self.param("positions", BERT_INIT, (rows * cols, self.config.width))
        return jnp.asarray(sincos_positions(rows, cols, self.config.width))
