"""Thinning of a frame's tokens and of a clip's frames. Pure functions; a keep rate is what stays.

A place is the patch of the frame at which a token stands; `NO_PLACE` marks a fused token, which
stands for several.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NO_PLACE = -1


def num_survivors(num_tokens: int, keep_rate: float) -> int:
    """Tokens that a stage keeps, the fused one not counted: rounded up, a static Python int.

    >>> num_survivors(68, 0.7), num_survivors(49, 0.7), num_survivors(36, 0.7)
    (48, 35, 26)
    """
    return min(num_tokens, max(1, math.ceil(num_tokens * keep_rate - 1e-6)))


def keep_rate_at(
    step: int, keep_rate: float, warmup_rates: tuple[float, ...], warmup_steps: int
) -> float:
    """The keep rate of the update after `step` updates: a few fixed values, then the target.

    Each value of `warmup_rates` holds for an equal part of `warmup_steps`; every value is a
    program of its own, since shapes are static (EViT anneals the rate; the steps are ours).

    >>> [keep_rate_at(step, 0.7, (1.0, 0.85), 10) for step in (0, 4, 5, 9, 10)]
    [1.0, 1.0, 0.85, 0.85, 0.7]
    """
    if step >= warmup_steps or not warmup_rates:
        return keep_rate
    return warmup_rates[step * len(warmup_rates) // warmup_steps]


def cls_attention(
    query: Float[Array, "f q h d"],
    key: Float[Array, "f q h d"],
    bias: Float[Array, "f h q q"] | None = None,
) -> Float[Array, "f m"]:
    """How much [CLS] attends to each other token, mean over heads (EViT, Liang et al. 2022).

    The softmax runs over all tokens, as in the block's own attention, whose `bias` is added. Only
    this one row is computed, so that the block itself may use a fused attention kernel.
    """
    row = None if bias is None else bias[:, :, :1]
    return _attention(query[:, :1], key, row)[:, :, 0, 1:].mean(axis=1)


def mean_attention(
    query: Float[Array, "f q h d"],
    key: Float[Array, "f q h d"],
    bias: Float[Array, "f h q q"] | None = None,
) -> Float[Array, "f m"]:
    """How much all tokens attend to each one but [CLS], mean over heads and queries (ours)."""
    return _attention(query, key, bias)[..., 1:].mean(axis=(1, 2))


def norm_score(tokens: Float[Array, "f m d"]) -> Float[Array, "f m"]:
    """The norm of each token's features; the scores of a frame sum to 1 (ours)."""
    norms = jnp.linalg.norm(tokens.astype(jnp.float32), axis=-1)
    return norms / jnp.maximum(norms.sum(axis=-1, keepdims=True), 1e-6)


def random_score(noise: Float[Array, "f m"]) -> Float[Array, "f m"]:
    """Uniform noise as scores, a baseline; the scores of a frame sum to 1 (ours)."""
    return noise / jnp.maximum(noise.sum(axis=-1, keepdims=True), 1e-6)


def _attention(query: Array, key: Array, bias: Array | None) -> Float[Array, "f h q k"]:
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = jnp.einsum("fqhd,fkhd->fhqk", query, key) / math.sqrt(query.shape[-1])
    return jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)


class Survivors(NamedTuple):
    """The tokens that a stage leaves, [CLS] first, and where they stand."""

    tokens: Float[Array, "f q d"]
    places: Int[Array, "f m"]  # of all tokens but [CLS]; NO_PLACE for a fused one


def thin(
    tokens: Float[Array, "f q d"],
    places: Int[Array, "f m"],
    scores: Float[Array, "f m"],
    *,
    keep_rate: float,
    rest: str,
) -> Survivors:
    """Keeps [CLS] and the tokens of the highest scores, in the order they had (EViT, SMAUG).

    Args:
      tokens: [CLS] first.
      places: patch of each other token; a fused token of an earlier stage competes as any other.
      scores: of each token but [CLS].
      keep_rate: fraction of the tokens kept; 1 changes nothing.
      rest: "fuse" appends sum_j score_j token_j over the others as one token; "drop" forgets them.

    Raises:
      ValueError: another `rest`.
    """
    if rest not in ("fuse", "drop"):
        raise ValueError(f"rest must be fuse or drop, not {rest!r}")
    count = num_survivors(scores.shape[-1], keep_rate)
    if count == scores.shape[-1]:
        return Survivors(tokens, places)
    cls, others = tokens[:, :1], tokens[:, 1:]
    _, best = jax.lax.top_k(scores, count)
    best = jnp.sort(best, axis=-1)
    kept = jnp.take_along_axis(others, best[..., None], axis=1)
    places_kept = jnp.take_along_axis(places, best, axis=1)
    if rest == "drop":
        return Survivors(jnp.concatenate([cls, kept], axis=1), places_kept)
    is_kept = (best[:, :, None] == jnp.arange(scores.shape[-1])).any(axis=1)
    weights = jnp.where(is_kept, 0.0, scores).astype(tokens.dtype)
    fused = jnp.einsum("fm,fmd->fd", weights, others)[:, None]
    nowhere = jnp.full_like(places_kept[:, :1], NO_PLACE)
    return Survivors(
        jnp.concatenate([cls, kept, fused], axis=1),
        jnp.concatenate([places_kept, nowhere], axis=1),
    )


class ChosenFrames(NamedTuple):
    """The K frames of the highest scores, in temporal order."""

    frames: Int[Array, "b K"]
    weights: Float[Array, "b K"]  # all 1; with the gradient of the straight-through estimator


def choose_frames(scores: Float[Array, "b t"], count: int) -> ChosenFrames:
    """The `count` best frames; their weights carry the gradient of a softmax over all frames.

    With Gumbel noise added to the scores this draws frames without replacement, with
    probabilities softmax(scores) (the Gumbel top-k trick, Kool et al. 2019); the backward pass
    is that of softmax (straight-through, Jang et al. 2017). SMAUG's text-guided selection; the
    estimator is ours.
    """
    _, frames = jax.lax.top_k(scores, count)
    frames = jnp.sort(frames, axis=-1)
    soft = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), frames, axis=-1)
    return ChosenFrames(frames, 1.0 + (soft - jax.lax.stop_gradient(soft)))


def uniform_frames(num_frames: int, count: int) -> tuple[int, ...]:
    """The middle frame of each of `count` equal segments of `num_frames`.

    >>> uniform_frames(4, 2), uniform_frames(5, 1)
    ((1, 3), (2,))
    """
    return tuple((2 * i + 1) * num_frames // (2 * count) for i in range(count))
