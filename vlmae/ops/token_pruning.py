"""Pruning of a frame's tokens and of a clip's frames. Pure functions; a keep rate is what stays.

Every token but [CLS] carries the id of its patch; a token fused from several has `NO_PATCH`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlmae.ops.losses import safe_norm
from vlmae.ops.registry import Registry

NO_PATCH = -1


def num_kept(num_tokens: int, keep_rate: float) -> int:
    """Count the tokens that a stage keeps, without the fused one: rounded up, a static int.

    >>> num_kept(68, 0.7), num_kept(49, 0.7), num_kept(36, 0.7)
    (48, 35, 26)
    """
    # 1e-6, since 100 * 0.55 is 55.00000000000001.
    return min(num_tokens, max(1, math.ceil(num_tokens * keep_rate - 1e-6)))


def cls_attention(
    query: Float[Array, "f q h d"],
    key: Float[Array, "f q h d"],
    bias: Float[Array, "f #h #q q"] | None = None,
) -> Float[Array, "f m"]:
    """Score tokens by the attention of [CLS], mean over heads (EViT, Liang et al. 2022).

    The softmax runs over all tokens, as in the block's own attention, whose `bias` is added. Only
    this one row is computed, so that the block itself may use a fused attention kernel.
    """
    row = None if bias is None else bias[:, :, :1]
    return _attention(query[:, :1], key, row)[:, :, 0, 1:].mean(axis=1)


def mean_attention(
    query: Float[Array, "f q h d"],
    key: Float[Array, "f q h d"],
    bias: Float[Array, "f #h #q q"] | None = None,
) -> Float[Array, "f m"]:
    """Score tokens by the attention of all tokens, mean over heads and queries (ours)."""
    return _attention(query, key, bias)[..., 1:].mean(axis=(1, 2))


def norm_score(tokens: Float[Array, "f m d"]) -> Float[Array, "f m"]:
    """Score tokens by the norm of their features; the scores of a frame sum to 1 (ours)."""
    norms = safe_norm(tokens.astype(jnp.float32))[..., 0]
    return norms / jnp.maximum(norms.sum(axis=-1, keepdims=True), 1e-6)


def random_score(noise: Float[Array, "f m"]) -> Float[Array, "f m"]:
    """Score tokens by uniform noise, a baseline; the scores of a frame sum to 1 (ours)."""
    return noise / jnp.maximum(noise.sum(axis=-1, keepdims=True), 1e-6)


def _attention(query: Array, key: Array, bias: Array | None) -> Float[Array, "f h q k"]:
    # Scores rank tokens: in bfloat16 many would tie, and ties go to the lower place.
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = jnp.einsum("fqhd,fkhd->fhqk", query, key) / math.sqrt(query.shape[-1])
    return jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)


class PrunedTokens(NamedTuple):
    """Tokens that a stage keeps, [CLS] first, and their patches."""

    tokens: Float[Array, "f q d"]
    patch_ids: Int[Array, "f m"]  # of all tokens but [CLS]; NO_PATCH for a fused one
    sizes: Float[Array, "f m"] | None = None  # patches merged to each token; None: one each


# (tokens, their scores, zero for kept ones) -> tokens that stand for the pruned ones
RESTS: Registry[Callable[[Array, Array], Array]] = Registry(
    "rest of the tokens",
    {
        # EViT's sum by scores, unnormalized.
        "fuse": lambda tokens, weights: jnp.einsum("fm,fmd->fd", weights, tokens)[:, None],
        "drop": lambda tokens, _: tokens[:, :0],
    },
)


def prune(
    tokens: Float[Array, "f q d"],
    patch_ids: Int[Array, "f m"],
    scores: Float[Array, "f m"],
    *,
    keep_rate: float,
    rest: str,
) -> PrunedTokens:
    """Keep [CLS] and the tokens of the highest scores, in the order they had (EViT, SMAUG).

    Args:
      tokens: [CLS] first.
      patch_ids: patch of each other token; a fused token of an earlier stage competes as any other.
      scores: of each token but [CLS].
      keep_rate: fraction of the tokens kept; 1 changes nothing.
      rest: one of `RESTS`; "fuse" appends sum_j score_j token_j over the pruned tokens as one
        token, "drop" forgets them.

    Raises:
      ValueError: `rest` is unknown.
    """
    summarize = RESTS[rest]
    count = num_kept(scores.shape[-1], keep_rate)
    if count == scores.shape[-1]:
        return PrunedTokens(tokens, patch_ids)
    cls, others = tokens[:, :1], tokens[:, 1:]
    _, best = jax.lax.top_k(scores, count)
    # In the order of the frame, so that nothing after a stage depends on the scores' order.
    best = jnp.sort(best, axis=-1)
    kept = jnp.take_along_axis(others, best[..., None], axis=1)
    kept_ids = jnp.take_along_axis(patch_ids, best, axis=1)
    # A comparison, since XLA shards it over the batch and a scatter it does not.
    is_kept = (best[:, :, None] == jnp.arange(scores.shape[-1])).any(axis=1)
    weights = jnp.where(is_kept, 0.0, scores).astype(tokens.dtype)
    fused = summarize(others, weights)
    fused_ids = jnp.full(fused.shape[:2], NO_PATCH, kept_ids.dtype)
    return PrunedTokens(
        jnp.concatenate([cls, kept, fused], axis=1),
        jnp.concatenate([kept_ids, fused_ids], axis=1),
    )


def merge(
    tokens: Float[Array, "f q d"],
    patch_ids: Int[Array, "f m"],
    sizes: Float[Array, "f m"] | None,
    keys: Float[Array, "f m e"],
    keep_rate: float,
) -> PrunedTokens:
    """Merge tokens of similar keys: bipartite soft matching (ToMe, Bolya et al. 2023).

    Every other token proposes to the most similar one of those between; the most similar of these
    pairs become their mean, weighted by size, at the place and patch of the second.

    Args:
      tokens: [CLS] first; it stays as it is.
      patch_ids: patch of each other token.
      sizes: patches that each stands for; None: one.
      keys: of attention, the mean over heads.
      keep_rate: fraction of the tokens left, at least a half; 1 changes nothing.
    """
    places = jnp.arange(patch_ids.shape[1])
    count = num_kept(len(places), keep_rate)
    if count == len(places):
        return PrunedTokens(tokens, patch_ids, sizes)
    sizes = jnp.ones(patch_ids.shape) if sizes is None else sizes
    # In float32: ties, which bfloat16 makes, go to the lower place.
    keys = jax.lax.stop_gradient(keys.astype(jnp.float32))
    keys /= safe_norm(keys)
    similarity = jnp.einsum("fie,fje->fij", keys[:, ::2], keys[:, 1::2])
    _, proposer = jax.lax.top_k(similarity.max(axis=2), len(places) - count)
    is_merged = (2 * proposer[:, :, None] == places).any(axis=1)
    partner = jnp.repeat(2 * similarity.argmax(axis=2) + 1, 2, axis=1)[:, : len(places)]
    goal = jnp.where(is_merged, partner, places)
    kept = jnp.argsort(is_merged, axis=1, stable=True)[:, :count]
    # Products with a matrix of shares, since XLA shards them over the batch and a scatter it does
    # not; beside a block they cost little.
    shares = jnp.where(kept[:, :, None] == goal[:, None], sizes[:, None], 0.0)
    new_sizes = shares.sum(axis=2)
    shares = (shares / new_sizes[:, :, None]).astype(tokens.dtype)
    merged = jnp.einsum("fij,fjd->fid", shares, tokens[:, 1:], precision="highest")
    return PrunedTokens(
        jnp.concatenate([tokens[:, :1], merged], axis=1),
        jnp.take_along_axis(patch_ids, kept, axis=1),
        new_sizes,
    )


def size_bias(sizes: Float[Array, "f m"]) -> Float[Array, "f 1 1 q"]:
    """Return the logarithm of the keys' sizes, [CLS] of size 1 first (ToMe).

    Added to the logits of attention, it lets a merged token weigh as much as the equal tokens that
    it stands for.
    """
    return jnp.log(jnp.pad(sizes, ((0, 0), (1, 0)), constant_values=1.0))[:, None, None]


def choose_frames(scores: Float[Array, "b t"], count: int) -> Int[Array, "b K"]:
    """Keep the `count` best frames, in temporal order; SMAUG's text-guided selection.

    With Gumbel noise added to the scores this draws frames without replacement, with
    probabilities softmax(scores) (the Gumbel top-k trick, Kool et al. 2019).
    """
    # Sorted: the frames' order in time is part of what the fusion reads.
    return jnp.sort(jax.lax.top_k(scores, count)[1], axis=-1)


def swap_probabilities(
    scores: Float[Array, "b t"], frames: Int[Array, "b K"]
) -> Float[Array, "b K t"]:
    """Compute the softmax of each slot over its own frame and those that no slot has (ours).

    This is the draw of one slot again while all others keep their frames. A slot's probabilities
    sum to 1 whatever the scores: a level that all frames share has no gradient.

    Args:
      scores: of all frames, without noise.
      frames: the chosen ones.
    """
    chosen = jax.nn.one_hot(frames, scores.shape[-1], dtype=bool)
    taken_elsewhere = chosen.any(axis=1, keepdims=True) & ~chosen
    return jax.nn.softmax(scores[:, None], axis=-1, where=~taken_elsewhere)


@jax.custom_vjp
def straight_through(
    kept: Float[Array, "b K *_"], frames: Float[Array, "b t *_"], swaps: Float[Array, "b K t"]
) -> Float[Array, "b K *_"]:
    """Return `kept`; its gradient also reaches `swaps`, as that of the mean of frames by `swaps`.

    The straight-through estimator (Bengio et al. 2013; Jang et al. 2017): a swap of a slot's
    frame changes the loss by about the slot's gradient times the difference of the two frames.
    Unlike a factor on `kept`, this survives the layer norms behind it. The forward pass costs
    nothing, and the backward pass one product with the frames.

    Args:
      kept: features of the chosen frames.
      frames: features of all frames.
      swaps: see `swap_probabilities`.
    """
    del frames, swaps
    return kept


def _straight_through_backward(frames: Array, grad: Array) -> tuple[Array, None, Array]:
    flat = [x.reshape(*x.shape[:2], -1) for x in (grad, frames)]
    # No gradient to the frames: in the forward pass those not chosen have no effect.
    return grad, None, jnp.einsum("bkd,btd->bkt", *flat, preferred_element_type=jnp.float32)


straight_through.defvjp(lambda kept, frames, _: (kept, frames), _straight_through_backward)


def uniform_frames(num_frames: int, count: int) -> tuple[int, ...]:
    """Return the middle frame of each of `count` equal segments of `num_frames`.

    >>> uniform_frames(4, 2), uniform_frames(5, 1)
    ((1, 3), (2,))
    """
    return tuple((2 * i + 1) * num_frames // (2 * count) for i in range(count))
