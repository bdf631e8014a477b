"""Weighted averages of many tokens to few (MuLTI, adapt-pooling). Pure functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def block_members(
    lengths: Int[Array, " b"], num_tokens: int, num_blocks: int
) -> Bool[Array, "b s m"]:
    """Assign tokens to `num_blocks` contiguous blocks of nearly equal size.

    Block i of a row with n valid tokens begins at token floor(i n / s) and ends before token
    ceil((i + 1) n / s): none is empty, and neighbors share a token where s does not divide n.
    Padding is in no block, and its length changes nothing.
    """
    block = jnp.arange(num_blocks)
    start = block * lengths[:, None] // num_blocks
    # Ceiling division of integers, exact at any length; bins as in torch's adaptive pooling.
    end = -(-(block + 1) * lengths[:, None] // num_blocks)
    token = jnp.arange(num_tokens)
    return (start[..., None] <= token) & (token < end[..., None])


def weighted_pool(
    x: Float[Array, "b m d"], scores: Float[Array, "_ _ m"], members: Bool[Array, "_ _ m"]
) -> Float[Array, "b s d"]:
    """Average tokens, weighted by the softmax of their scores over the members of each pool.

    Scores and members are broadcast over rows and pools; every pool needs a member. The softmax is
    float32. With equal scores this is average pooling; with one token a pool, the identity.
    """
    scores, members = jnp.broadcast_arrays(scores.astype(jnp.float32), members)
    # `where`, not a large negative score: padding gets exact zeros and no gradient.
    weights = jax.nn.softmax(scores, axis=-1, where=members)
    return jnp.einsum("bsm,bmd->bsd", weights.astype(x.dtype), x)
