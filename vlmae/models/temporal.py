"""Temporal part of the video encoder: frame embeddings, and attention across frames."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vlmae.config.model import VideoEncoderConfig
from vlmae.models.blocks import vit_block
from vlmae.models.embeddings import sincos_clip_positions
from vlmae.models.layers import Compute
from vlmae.ops.registry import Registry

# (key, shape) -> initial table of the temporal embeddings
TIME_INITS: Registry[Callable[[Array, tuple[int, int]], Array]] = Registry(
    "initialization of time",
    {
        "zeros": lambda _, shape: jnp.zeros(shape),  # Singularity-temporal
        "sincos": lambda _, shape: jnp.asarray(sincos_clip_positions(*shape)),  # ours
    },
)


class Temporal(nn.Module):
    """Temporal embeddings, then attention across frames at each patch (Singularity-temporal).

    As in SMAUG's base system it follows the spatial encoder. Under a mask two frames keep different
    patches; each token then attends to the tokens of its own patch, and [CLS] to the [CLS] of the
    other frames (ours).

    Attributes:
      config: all of `time_*`; heads and feed-forward network are the encoder's.
    """

    config: VideoEncoderConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b t q d"], patch_ids: Int[Array, "b t q"], aligned: bool
    ) -> Float[Array, "b t q d"]:
        """Apply temporal embeddings, then the blocks.

        Args:
          tokens: tokens of all frames.
          patch_ids: patch of each token; [CLS] has an id of its own.
          aligned: promises that all frames have equal `patch_ids`. Attention then runs over t
            tokens, far cheaper than over all t q of them under a mask.
        """
        config, t = self.config, tokens.shape[1]
        if config.time_frames:
            shape = (config.time_frames, tokens.shape[-1])
            table = self.param("embedding", TIME_INITS[config.time_init], shape)
            # Clips of another length take interpolated embeddings.
            table = jax.image.resize(table, (t, tokens.shape[-1]), "linear")
            tokens = (tokens + table[:, None]).astype(tokens.dtype)  # float32: see `affine`
        # Few keys for each query, or a mask: no work for a fused kernel.
        compute = dataclasses.replace(self.compute, attention="xla")
        for i in range(config.time_depth):
            block = vit_block(config.num_heads, config.mlp_dim, compute, name=f"block_{i}")
            if aligned:
                # Patches become rows of a batch: no mask, and t keys a query.
                x = block(rearrange(tokens, "b t q d -> (b q) t d"))
                tokens = rearrange(x, "(b q) t d -> b t q d", q=tokens.shape[2])
            else:
                flat = rearrange(patch_ids, "b t q -> b (t q)")
                # Equal ids: a token whose patch no other frame kept attends to itself alone.
                mask = flat[:, :, None] == flat[:, None, :]
                x = block(rearrange(tokens, "b t q d -> b (t q) d"), mask=mask)
                tokens = rearrange(x, "b (t q) d -> b t q d", t=t)
        return tokens
