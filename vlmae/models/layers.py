"""The only attention, feed-forward network and transformer block of the library."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

BERT_INIT = nn.initializers.normal(0.02)
VIT_INIT = nn.initializers.xavier_uniform()


class Attention(nn.Module):
    """Multi-head attention from `x` to `context`, or to itself.

    Projections are plain matrices, heads side by side, as in the PyTorch references. The softmax
    is computed in float32 whatever the activations' type is.

    Attributes:
      num_heads: attention heads; divides the width of `x`.
      kernel_init: initializer of the four projections.
      dtype: type of the activations.
      implementation: "xla" or "cudnn" (`jax.nn.dot_product_attention`).
    """

    num_heads: int
    kernel_init: Callable = VIT_INIT
    dtype: str = "float32"
    implementation: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b q d"],
        context: Float[Array, "b k e"],
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b q d"]:
        """`lengths` counts the valid tokens at the front of each row of `context`."""

        def project(name: str, y: Array) -> Array:
            dense = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init, name=name)
            return dense(y)

        def heads(y: Array) -> Array:
            return rearrange(y, "b l (h d) -> b l h d", h=self.num_heads)

        out = jax.nn.dot_product_attention(
            heads(project("query", x)),
            heads(project("key", context)),
            heads(project("value", context)),
            key_value_seq_lengths=lengths,
            query_seq_lengths=None if lengths is None else jnp.full_like(lengths, x.shape[1]),
            implementation=self.implementation,
        )
        return project("out", rearrange(out, "b l h d -> b l (h d)"))


class Mlp(nn.Module):
    """Two dense layers with the exact GELU between them (as in BERT and ViT)."""

    hidden_dim: int
    kernel_init: Callable = VIT_INIT
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, dtype=self.dtype, kernel_init=self.kernel_init, name=name)

        return dense(x.shape[-1], "down")(
            nn.gelu(dense(self.hidden_dim, "up")(x), approximate=False)
        )


class Block(nn.Module):
    """A transformer block: self-attention, cross-attention if there is a context, feed-forward.

    Attributes:
      num_heads, mlp_dim: sizes of attention and feed-forward network.
      pre_norm: normalize before each sublayer (ViT) or after its residual sum (BERT).
      eps: of the layer norms; 1e-6 in ViT-MAE, 1e-12 in BERT.
      dropout: on the output of each sublayer.
      deterministic: no dropout.
      kernel_init, dtype, attention: see `Attention`.
    """

    num_heads: int
    mlp_dim: int
    pre_norm: bool
    eps: float
    dropout: float = 0.0
    deterministic: bool = True
    kernel_init: Callable = VIT_INIT
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        lengths: Int[Array, " b"] | None = None,
        context: Float[Array, "b k e"] | None = None,
    ) -> Float[Array, "b l d"]:
        """`lengths` counts the valid tokens of `x`; every token of `context` is valid."""

        def residual(x: Array, name: str, sublayer: Callable[[Array], Array]) -> Array:
            norm = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name=f"{name}_norm")
            drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
            return x + drop(sublayer(norm(x))) if self.pre_norm else norm(x + drop(sublayer(x)))

        def attention(name: str) -> Attention:
            return Attention(
                self.num_heads, self.kernel_init, self.dtype, self.attention, name=name
            )

        x = residual(x, "attention", lambda y: attention("attention")(y, y, lengths))
        if context is not None:
            cross = attention("cross_attention")
            x = residual(x, "cross_attention", lambda y: cross(y, context))
        mlp = Mlp(self.mlp_dim, self.kernel_init, self.dtype, name="mlp")
        return residual(x, "mlp", mlp)


def block_class(remat: bool) -> type[Block]:
    """`Block`, or a `Block` whose activations are computed again in the backward pass."""
    return nn.remat(Block) if remat else Block


def vit_block(
    num_heads: int, mlp_dim: int, name: str, *, remat: bool, dtype: str, attention: str
) -> Block:
    """A ViT layer (pre-norm, eps of MAE), for the video encoder and the pixel decoder alike."""
    return block_class(remat)(
        num_heads, mlp_dim, pre_norm=True, eps=1e-6, dtype=dtype, attention=attention, name=name
    )
