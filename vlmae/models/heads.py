"""Small heads on top of the features: projections, words, classes."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlmae.models.layers import BERT_EPS, BERT_INIT, Dense


class Projection(nn.Module):
    """A linear map into the shared space, then unit length; float32, since similarities are."""

    embed_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        y = Dense(self.embed_dim, kernel_init=BERT_INIT, name="dense")(x.astype(jnp.float32))
        return y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-6)


class WordTransform(nn.Module):
    """BERT's transform before the tied word scores: dense, exact GELU, layer norm."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x = Dense(x.shape[-1], dtype=self.dtype, kernel_init=BERT_INIT, name="dense")(x)
        x = nn.gelu(x, approximate=False)
        return nn.LayerNorm(epsilon=BERT_EPS, dtype=self.dtype, name="norm")(x)


class Classifier(nn.Module):
    """Two linear maps with an exact GELU between: d -> 2d -> classes; float32 (MuLTI)."""

    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b c"]:
        x = x.astype(jnp.float32)
        x = Dense(2 * x.shape[-1], kernel_init=BERT_INIT, name="hidden")(x)
        x = nn.gelu(x, approximate=False)
        return Dense(self.num_classes, kernel_init=BERT_INIT, name="classes")(x)
