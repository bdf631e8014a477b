"""Adapt-pooling: many tokens averaged to a few (MuLTI, adapt-pooling residual). Pure functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def valid_tokens(lengths: Int[Array, " b"], num_tokens: int) -> Bool[Array, "b 1 m"]:
    """True on the first `lengths` tokens of each row."""
    return (jnp.arange(num_tokens) < lengths[:, None])[:, None]


def block_members(
    lengths: Int[Array, " b"], num_tokens: int, num_blocks: int
) -> Bool[Array, "b s m"]:
    """Which tokens belong to each of `num_blocks` contiguous blocks of nearly equal size.

    Block i of a row with n valid tokens begins at token floor(i n / s) and ends before token
    ceil((i + 1) n / s): none is empty, and neighbors share a token where s does not divide n.
    Padding is in no block, and how much of it there is changes nothing.
    """
    block = jnp.arange(num_blocks)
    start = block * lengths[:, None] // num_blocks
    end = -(-(block + 1) * lengths[:, None] // num_blocks)
    token = jnp.arange(num_tokens)
    return (start[..., None] <= token) & (token < end[..., None])


def weighted_pool(
    x: Float[Array, "b m d"], scores: Float[Array, "_ _ m"], members: Bool[Array, "_ _ m"]
) -> Float[Array, "b s d"]:
    """Means of tokens, weighted by the softmax of their scores over the members of each pool.

    Scores and members are broadcast over rows and pools; every pool needs a member. The softmax is
    float32. With equal scores this is average pooling; with one token a pool, the identity.
    """
    scores, members = jnp.broadcast_arrays(scores.astype(jnp.float32), members)
    weights = jax.nn.softmax(scores, axis=-1, where=members)
    return jnp.einsum("bsm,bmd->bsd", weights.astype(x.dtype), x)
