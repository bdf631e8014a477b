"""Time in the video encoder: embeddings of the frames, and attention over frames at one place."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from vlmae.model_config import Remat, VideoEncoderConfig
from vlmae.models.embeddings import sincos_clip_positions
from vlmae.models.layers import vit_block


class Temporal(nn.Module):
    """What lets a frame know the others: embeddings of time, then blocks over time.

    The base system's temporal variant does this after a spatial encoder, with embeddings that start
    from zero (Singularity-temporal); from sines and cosines is ours.
    Under a mask the tokens of two frames stand at different places; each token then looks at those
    of its own place, and [CLS] at the other frames' [CLS] (ours).

    Attributes:
      config: all of `time_*`; heads and feed-forward network are the encoder's.
      remat, dtype: see `ModelConfig`.
    """

    config: VideoEncoderConfig
    remat: Remat = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b t q d"],
        places: Int[Array, "b t q"],
        aligned: bool,
    ) -> Float[Array, "b t q d"]:
        """`aligned` promises that `places` are the same in all frames, which is cheaper."""
        t = tokens.shape[1]
        if self.config.time_frames:
            shape = (self.config.time_frames, tokens.shape[-1])
            table = self.param("embedding", self._initial_times, shape)
            tokens = tokens + at_length(table, t).astype(self.dtype)[:, None]
        for i in range(self.config.time_depth):
            block = vit_block(
                self.config.num_heads,
                self.config.mlp_dim,
                f"block_{i}",
                remat=self.remat,
                dtype=self.dtype,
                attention="xla",  # few keys for each query, or a mask: nothing for fused kernels
            )
            if aligned:
                x = block(rearrange(tokens, "b t q d -> (b q) t d"))
                tokens = rearrange(x, "(b q) t d -> b t q d", q=tokens.shape[2])
            else:
                flat = rearrange(places, "b t q -> b (t q)")
                mask = flat[:, :, None] == flat[:, None, :]
                x = block(rearrange(tokens, "b t q d -> b (t q) d"), mask=mask)
                tokens = rearrange(x, "b (t q) d -> b t q d", t=t)
        return tokens

    def _initial_times(self, key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "n d"]:
        if self.config.time_init == "zeros":
            return jnp.zeros(shape)
        return jnp.asarray(sincos_clip_positions(*shape))


def at_length(table: Float[Array, "n d"], length: int) -> Float[Array, "t d"]:
    """The table, interpolated linearly in time if it has another length."""
    return jax.image.resize(table, (length, table.shape[1]), "linear")


def with_cls_place(places: Int[Array, "b t m"], num_places: int) -> Int[Array, "b t q"]:
    """Places of [CLS] and the other tokens; [CLS] stands at a place of its own."""
    cls = jnp.full_like(places[:, :, :1], num_places)
    return jnp.concatenate([cls, places], axis=2)
