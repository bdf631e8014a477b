"""The only attention, feed-forward network and transformer block of the library."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlmae.model_config import Remat
from vlmae.sharding import keep_rows

# BERT's kernels at its width of 768; narrower inputs get larger weights. With 0.02 everywhere a
# model 96 wide starts with layers that hardly change their tokens, and does not learn to match.
BERT_INIT = nn.initializers.variance_scaling(0.02**2 * 768, "fan_in", "normal")
TOKEN_INIT = nn.initializers.normal(0.02)  # single tokens and tables, whatever their width
VIT_INIT = nn.initializers.xavier_uniform()
BERT_EPS, VIT_EPS = 1e-12, 1e-6  # of the layer norms; ViT's as in MAE


def uniform_noise(module: nn.Module, shape: tuple[int, ...]) -> Float[Array, "b *n"]:
    """Noise in [0, 1) from the "noise" stream; where none is given, the same for all rows.

    So in evaluation nothing depends on the place of a clip in its batch.
    """
    if module.has_rng("noise"):
        return jax.random.uniform(module.make_rng("noise"), shape)
    return jnp.broadcast_to(jax.random.uniform(jax.random.key(0), shape[1:]), shape)


def dot_rows(
    x: Float[Array, "*b d"], kernel: Float[Array, "d e"], *dimensions: object, **options: Any
) -> Float[Array, "*b e"]:
    """The product of tokens with a kernel, as `nn.Dense` takes it (`dot_general`).

    To XLA all tokens are the rows of one matrix: over two dimensions of rows its kernel gradient
    would want a transposed copy of what comes back.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], -1)


Dense = functools.partial(nn.Dense, dot_general=dot_rows)  # every dense layer of the models


def to_width(embed: nn.Dense, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    """What `embed` makes of tokens; those of its width stay as they are, without parameters."""
    return x if x.shape[-1] == embed.features else embed(x)


def take_rows(x: Shaped[Array, "s *_"], rows: Int[Array, "p n"]) -> Shaped[Array, "b *_"]:
    """The rows of x that those of a batch ask for, each within its own part of x.

    Where each part lies on a device of its own, nothing crosses the network.
    """
    parts = rearrange(x, "(p s) ... -> p s ...", p=len(rows))
    taken = jax.vmap(lambda part, wanted: part[wanted])(parts, rows)
    return rearrange(taken, "p n ... -> (p n) ...")


class Source(NamedTuple):
    """Tokens that the rows of a batch read; what they give by themselves is computed once.

    Without `rows`, row i reads row i; see `take_rows`.
    """

    tokens: Float[Array, "s k e"]
    rows: Int[Array, "p n"] | None = None

    def spread(self, x: Float[Array, "s *_"]) -> Float[Array, "b *_"]:
        """What was computed of the tokens, for each row that reads them."""
        return x if self.rows is None else take_rows(x, self.rows)


class Attended(NamedTuple):
    """What attention makes; queries and keys are for those who score tokens by them."""

    tokens: Float[Array, "b q d"]
    query: Float[Array, "b q h e"]
    key: Float[Array, "b k h e"]


def fused_attention(
    query: Float[Array, "b q h e"],
    key: Float[Array, "b k h e"],
    value: Float[Array, "b k h e"],
    lengths: Int[Array, " b"] | None,
) -> Float[Array, "b q h e"]:
    """cuDNN's attention, for any number of tokens.

    In training JAX (0.10 and 0.11) hands it even numbers of queries and keys alone, and raises
    NotImplementedError for others; an odd number gets one more token, which nobody reads.
    """

    def even(x: Float[Array, "b l h e"]) -> Float[Array, "b _ h e"]:
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    rows, queries = query.shape[:2]
    if lengths is None and key.shape[1] % 2:
        lengths = jnp.full(rows, key.shape[1], jnp.int32)
    out = jax.nn.dot_product_attention(
        even(query),
        even(key),
        even(value),
        query_seq_lengths=None if lengths is None else jnp.full_like(lengths, queries),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out[:, :queries]


class Attention(nn.Module):
    """Multi-head attention from `x` to `context`, or to itself.

    Projections are plain matrices, heads side by side, as in the PyTorch references. The softmax
    is computed in float32 whatever the activations' type is.

    Attributes:
      num_heads: attention heads; divides the width of `x`.
      kernel_init: initializer of the four projections.
      dtype: type of the activations.
      implementation: "xla" or "cudnn" (`jax.nn.dot_product_attention`); with a mask or a bias
        always the former.
    """

    num_heads: int
    kernel_init: Callable = VIT_INIT
    dtype: str = "float32"
    implementation: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b q d"],
        context: Float[Array, "b _ e"] | None,
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b q k"] | None = None,
        bias: Float[Array, "b h q k"] | None = None,
        source: Source | None = None,
    ) -> Attended:
        """What `x` reads in `context`, and after it in `source`.

        Args:
          x: queries.
          context: keys and values, row by row; None: `source` alone.
          lengths: valid tokens at the front of each row of keys.
          mask: True where a query may look at a key.
          bias: what is added to the logits before the softmax.
          source: keys and values that several rows may share.
        """

        def dense(name: str) -> Callable[[Array], Array]:
            size = x.shape[-1]
            return Dense(size, dtype=self.dtype, kernel_init=self.kernel_init, name=name)

        def heads(y: Array) -> Array:
            return rearrange(y, "b l (h d) -> b l h d", h=self.num_heads)

        def read(name: str) -> Array:
            project = dense(name)
            own = [] if context is None else [heads(project(context))]
            shared = [] if source is None else [source.spread(heads(project(source.tokens)))]
            return jnp.concatenate([*own, *shared], axis=1)

        query, key, value = heads(dense("query")(x)), read("key"), read("value")
        if self.implementation == "cudnn" and mask is None and bias is None:
            out = fused_attention(query, key, value, lengths)
        else:
            out = jax.nn.dot_product_attention(
                query,
                key,
                value,
                bias=None if bias is None else bias.astype(query.dtype),
                mask=None if mask is None else mask[:, None],
                key_value_seq_lengths=lengths,
                implementation="xla",
            )
        return Attended(dense("out")(rearrange(out, "b l h d -> b l (h d)")), query, key)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),  # the exact one, as in BERT and ViT
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP
}


class Mlp(nn.Module):
    """Two dense layers with an activation between them."""

    hidden_dim: int
    kernel_init: Callable = VIT_INIT
    dtype: str = "float32"
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        def dense(width: int, name: str) -> nn.Dense:
            return Dense(width, dtype=self.dtype, kernel_init=self.kernel_init, name=name)

        hidden = ACTIVATIONS[self.activation](dense(self.hidden_dim, "up")(x))
        return dense(x.shape[-1], "down")(hidden)


class Block(nn.Module):
    """A transformer block: self-attention, cross-attention if there is a context, feed-forward.

    Attributes:
      num_heads, mlp_dim: sizes of attention and feed-forward network.
      pre_norm: normalize before each sublayer (ViT) or after its residual sum (BERT).
      eps: of the layer norms.
      dropout: on the output of each sublayer.
      deterministic: no dropout.
      kernel_init, dtype, attention: see `Attention`.
      activation: of the feed-forward network, one of `ACTIVATIONS`.
      layer_scale: initial factor of each sublayer's output, learned by channel; 0 has none.
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
    activation: str = "gelu"
    layer_scale: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        lengths: Int[Array, " b"] | None = None,
        context: Source | None = None,
        mask: Bool[Array, "b l l"] | None = None,
        context_lengths: Int[Array, " b"] | None = None,
        bias: Float[Array, "b h l l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """All sublayers in turn.

        Args:
          x: tokens.
          lengths: valid tokens at the front of each row of `x`.
          context: what cross-attention reads.
          mask: True where a token may look at another in self-attention.
          context_lengths: valid tokens at the front of each row of `context`; default all.
          bias: added to the logits of self-attention.
        """
        x = self.self_attention(x, lengths, mask, bias).tokens
        if context is not None:
            cross = self._attention("cross_attention")
            read = functools.partial(cross, context=None, lengths=context_lengths, source=context)
            x = self._residual(x, "cross_attention", lambda y: read(y).tokens)
        return self.feed_forward(x)

    def self_attention(
        self,
        x: Array,
        lengths: Array | None = None,
        mask: Array | None = None,
        bias: Array | None = None,
    ) -> Attended:
        """The first sublayer, with its residual sum, and its queries and keys."""
        attended: list[Attended] = []

        def sublayer(y: Array) -> Array:
            attended.append(self._attention("attention")(y, y, lengths, mask, bias))
            return attended[0].tokens

        x = self._residual(x, "attention", sublayer)
        return attended[0]._replace(tokens=x)

    def feed_forward(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """The last sublayer, with its residual sum."""
        mlp = Mlp(self.mlp_dim, self.kernel_init, self.dtype, self.activation, name="mlp")
        return self._residual(x, "mlp", mlp)

    def _residual(self, x: Array, name: str, sublayer: Callable[[Array], Array]) -> Array:
        norm = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name=f"{name}_norm")
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        if not self.pre_norm:
            return norm(keep_rows(x + drop(sublayer(x))))
        added = sublayer(norm(x))
        if self.layer_scale:
            initial = nn.initializers.constant(self.layer_scale)
            added = added * self.param(f"{name}_scale", initial, added.shape[-1:]).astype(x.dtype)
        return keep_rows(x + drop(added))

    def _attention(self, name: str) -> Attention:
        return Attention(self.num_heads, self.kernel_init, self.dtype, self.attention, name=name)


@functools.cache
def block_class(kind: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """The class of a block as models use it: traced once for all blocks that are equal.

    (In a profile they all bear the first one's name.) With `remat`, the backward pass computes its
    activations again.
    """
    if remat != "none":
        # Products of activations with parameters have no batch dimension, those of attention have.
        dense_layers = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        kind = nn.remat(kind, policy=dense_layers if remat == "selective" else None)
    return nn.jit(kind)


def vit_norm(name: str, dtype: str) -> nn.LayerNorm:
    """A layer norm with the eps of MAE, for every part of the model that is no BERT."""
    return nn.LayerNorm(epsilon=VIT_EPS, dtype=dtype, name=name)


def vit_block(
    num_heads: int, mlp_dim: int, name: str, *, remat: Remat, dtype: str, attention: str
) -> Block:
    """A ViT layer (pre-norm, eps of MAE), for every part of the model that is no BERT."""
    return block_class(Block, remat)(**vit_options(num_heads, mlp_dim, dtype, attention), name=name)


def vit_options(num_heads: int, mlp_dim: int, dtype: str, attention: str) -> dict:
    """The fields that make a `Block` a ViT layer."""
    return {
        "num_heads": num_heads,
        "mlp_dim": mlp_dim,
        "pre_norm": True,
        "eps": VIT_EPS,
        "dtype": dtype,
        "attention": attention,
    }
