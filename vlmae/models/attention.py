"""Multi-head attention, the only one of the library: its kernels, and keys that rows share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlmae.models.layers import VIT_INIT, Compute, Dense
from vlmae.ops.registry import Registry


def xla_attention(
    query: Float[Array, "b q h e"],
    key: Float[Array, "b k h e"],
    value: Float[Array, "b k h e"],
    lengths: Int[Array, " b"] | None = None,
    mask: Bool[Array, "b q k"] | None = None,
    bias: Float[Array, "#b #h #q k"] | None = None,
) -> Float[Array, "b q h e"]:
    """Compute attention by XLA, which takes a mask and a bias as well; float32 softmax."""
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=None if bias is None else bias.astype(query.dtype),
        mask=None if mask is None else mask[:, None],
        key_value_seq_lengths=lengths,
        implementation="xla",
    )


def cudnn_attention(
    query: Float[Array, "b q h e"],
    key: Float[Array, "b k h e"],
    value: Float[Array, "b k h e"],
    lengths: Int[Array, " b"] | None = None,
) -> Float[Array, "b q h e"]:
    """Compute attention by cuDNN's fused kernel, for any number of tokens.

    In training JAX (0.10 and 0.11) passes cuDNN only even numbers of queries and keys and raises
    NotImplementedError for odd ones; an odd number gets one padding token, masked by the lengths.
    """

    def even(x: Float[Array, "b l h e"]) -> Float[Array, "b _ h e"]:
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    # Lengths only where a padding token was added or rows have padding: without them cuDNN skips
    # its masks.
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


def has_cudnn_attention(device: Any) -> bool:
    """Return True for an NVIDIA GPU of compute capability 8.0 (A100) or later."""
    # AMD's GPUs have names there ("gfx942"), and other devices nothing.
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return device.platform in ("gpu", "cuda") and major.isdigit() and int(major) >= 8


def even_tokens(
    x: Float[Array, "b l d"], kernel: str
) -> tuple[Float[Array, "b _ d"], Int[Array, " b"] | None]:
    """Append a padding token where the kernel takes only even numbers of tokens.

    Once for a whole encoder: blocks that get an odd number copy queries, keys and values for it,
    forward and backward.

    Returns:
      The tokens, and the valid ones of each row; None if there is no padding.
    """
    if kernel != "cudnn" or x.shape[1] % 2 == 0:
        return x, None
    lengths = jnp.full(x.shape[0], x.shape[1], jnp.int32)
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0))), lengths


KERNELS: Registry[Callable[..., Array]] = Registry(
    "attention kernel", {"xla": xla_attention, "cudnn": cudnn_attention}
)


def take_rows(x: Shaped[Array, "s *_"], rows: Int[Array, "p n"]) -> Shaped[Array, "b *_"]:
    """Gather rows of `x`; indices count within each of p equal parts of `x`.

    With one part a device nothing crosses the network: a gather by global indices would make XLA
    collect all of `x` on every device.
    """
    # The leading axis is the sharded one, so each device gathers from its own part.
    parts = rearrange(x, "(p s) ... -> p s ...", p=len(rows))
    taken = jax.vmap(lambda part, ids: part[ids])(parts, rows)
    return rearrange(taken, "p n ... -> (p n) ...")


class Source(NamedTuple):
    """Key/value tokens that several query rows may share, projected once per source row.

    Without `rows`, query row i reads source row i; otherwise see `take_rows`.
    """

    tokens: Float[Array, "s k e"]
    rows: Int[Array, "p n"] | None = None

    def gather(self, x: Float[Array, "s *_"]) -> Float[Array, "b *_"]:
        """Gather, for each query row, what was computed from its source row."""
        return x if self.rows is None else take_rows(x, self.rows)


class Attended(NamedTuple):
    """Output of attention; queries and keys serve those who score tokens by them."""

    tokens: Float[Array, "b q d"]
    query: Float[Array, "b q h e"]
    key: Float[Array, "b k h e"]


class Attention(nn.Module):
    """Multi-head attention from `x` to `context`, to a shared `source`, or to both.

    Projections are plain matrices with the heads side by side, as in the PyTorch references.

    Attributes:
      num_heads: attention heads; divides the width of `x`.
      kernel_init: initializer of the four projections.
      compute: dtype and kernel; with a mask or a bias the kernel is always XLA's.
    """

    num_heads: int
    kernel_init: Callable = VIT_INIT
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b q d"],
        context: Float[Array, "b _ e"] | None,
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b q k"] | None = None,
        bias: Float[Array, "b #h #q k"] | None = None,
        source: Source | None = None,
    ) -> Attended:
        """Attend from every query to the keys of `context`, then to those of `source`.

        Args:
          x: tokens that become queries.
          context: tokens that become keys and values, row by row; None: `source` alone.
          lengths: valid keys at the front of each row; None: all are.
          mask: True where a query may attend to a key.
          bias: added to the logits before the softmax.
          source: tokens that become keys and values of several rows.
        """
        dense = functools.partial(
            Dense, x.shape[-1], compute=self.compute, kernel_init=self.kernel_init
        )

        # A view of plain matrices: the kernels keep two dimensions, which one set of sharding
        # rules, one optimizer mask and PyTorch's layout fit.
        def split_heads(y: Array) -> Array:
            return rearrange(y, "b l (h e) -> b l h e", h=self.num_heads)

        def read(name: str) -> Array:
            project, parts = dense(name=name), []
            if context is not None:
                parts.append(split_heads(project(context)))
            if source is not None:  # projected before the gather: once, however many rows read it
                parts.append(source.gather(split_heads(project(source.tokens))))
            return jnp.concatenate(parts, axis=1)

        # Named projections, not one fused matrix: published weights have three, and `tensor` shards
        # each by heads.
        query, key, value = split_heads(dense(name="query")(x)), read("key"), read("value")
        # A mask of lengths alone is no mask here: cuDNN takes lengths, but neither masks nor
        # biases.
        if mask is None and bias is None:
            out = KERNELS[self.compute.attention](query, key, value, lengths)
        else:
            out = xla_attention(query, key, value, lengths, mask, bias)
        return Attended(dense(name="out")(rearrange(out, "b l h e -> b l (h e)")), query, key)
