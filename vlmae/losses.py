"""The losses as pure functions, in float32. They import nothing of ours."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

NEVER = -1e9  # a logit that no softmax and no draw ever picks


def masked_mean(values: Float[Array, "*b"], mask: Bool[Array, "*b"]) -> Float[Array, ""]:
    """Mean over the elements where `mask` is True; 0 if there is none."""
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def similarity(video: Float[Array, "b t e"], text: Float[Array, "c e"]) -> Float[Array, "b c"]:
    """Mean over a clip's frames of the inner product with each text."""
    return video.mean(axis=1) @ text.T


def same_shard(num_rows: int, shards: int) -> Bool[Array, "b b"]:
    """True where two rows of a batch lie on the same device: each holds a contiguous part."""
    shard = jnp.arange(num_rows) // (num_rows // shards)
    return shard[:, None] == shard[None, :]


def contrastive_loss(
    logits: Float[Array, "b b"],
    media_ids: Int[Array, " b"],
    valid: Bool[Array, " b"],
    shards: int = 1,
) -> Float[Array, ""]:
    """Symmetric cross-entropy of clips (rows) and texts (columns); SMAUG's VTC.

    All pairs of equal media id are positives and share the target equally. Invalid rows are
    neither queries nor candidates. With `shards`, rows are compared within their own shard only.
    """
    candidate = valid[None, :] & same_shard(len(valid), shards)
    positive = (media_ids[:, None] == media_ids[None, :]) & valid[:, None] & candidate
    targets = positive / jnp.maximum(positive.sum(axis=1, keepdims=True), 1)

    def one_way(logits: Array) -> Array:
        log_p = jax.nn.log_softmax(jnp.where(candidate, logits, NEVER), axis=1)
        return masked_mean(-(targets * log_p).sum(axis=1), valid)

    return (one_way(logits) + one_way(logits.T)) / 2


class Negatives(NamedTuple):
    """For each row, the index of a hard negative, and whether there is one at all."""

    index: Int[Array, " b"]
    exists: Bool[Array, " b"]


def mine_negatives(
    key: Key[Array, ""],
    logits: Float[Array, "b b"],
    media_ids: Int[Array, " b"],
    valid: Bool[Array, " b"],
    shards: int = 1,
) -> Negatives:
    """Draws one column a row from softmax(logits), never one of equal media id or an invalid one.

    This is the hard-negative mining of ALBEF, which SMAUG's base uses. With `shards`, a row's
    negative lies in its own shard.
    """
    allowed = (media_ids[:, None] != media_ids[None, :]) & valid[None, :]
    allowed &= same_shard(len(valid), shards)
    index = jax.random.categorical(key, jnp.where(allowed, logits, NEVER), axis=1)
    return Negatives(index, allowed.any(axis=1) & valid)


def cross_entropy(logits: Float[Array, "*b c"], labels: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Cross-entropy of each element."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]


class MaskedWords(NamedTuple):
    """A text with hidden words."""

    ids: Int[Array, "b l"]
    targets_mask: Bool[Array, "b l"]  # True where the original word is to be predicted


def mask_words(
    key: Key[Array, ""],
    ids: Int[Array, "b l"],
    maskable: Bool[Array, "b l"],
    *,
    ratio: float,
    mask_id: int,
    vocab_size: int,
) -> MaskedWords:
    """BERT's masking: of the chosen words 80 % become [MASK], 10 % a random word, 10 % stay.

    Args:
      key: random key.
      ids: word ids.
      maskable: True where a word may be chosen (never [PAD] or [CLS]).
      ratio: probability that a maskable word is chosen.
      mask_id: id of [MASK].
      vocab_size: random words are drawn from [0, vocab_size).
    """
    choose_key, fate_key, word_key = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(choose_key, ratio, ids.shape) & maskable
    fate = jax.random.uniform(fate_key, ids.shape)
    random_ids = jax.random.randint(word_key, ids.shape, 0, vocab_size, ids.dtype)
    hidden = jnp.where(fate < 0.8, mask_id, jnp.where(fate < 0.9, random_ids, ids))
    return MaskedWords(jnp.where(chosen, hidden, ids), chosen)


def normalize_patches(patches: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
    """Each patch to zero mean and unit variance (unbiased, + 1e-6), as MAE's target."""
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, keepdims=True, ddof=1)
    return (patches - mean) / jnp.sqrt(variance + 1e-6)


def reconstruction_loss(
    predicted: Float[Array, "b t s p"],
    target: Float[Array, "b t s p"],
    counted: Bool[Array, "b t s"],
) -> Float[Array, ""]:
    """Mean squared error of a patch, averaged over the counted (removed) patches; SMAUG's MVM."""
    return masked_mean(jnp.square(predicted - target).mean(axis=-1), counted)
