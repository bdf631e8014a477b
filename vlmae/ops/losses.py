"""Losses and the samples they need, as pure functions in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

# A logit that no softmax and no draw ever picks; -inf gives NaN in a row that allows nothing.
NEVER = -1e9


def masked_mean(values: Float[Array, "*b"], mask: Bool[Array, "*b"]) -> Float[Array, ""]:
    """Average the elements where `mask` is True; 0 if there is none.

    Masked elements get no gradient. What computes them must not be infinite, or zero times an
    infinite slope is NaN there: mask its inputs.
    """
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def safe_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b 1"]:
    """Compute the norm of each vector; at zero its gradient is zero, where a root has NaN."""
    squares = jnp.square(x).sum(axis=-1, keepdims=True)
    is_zero = squares == 0
    # Both: `where` alone would multiply its zero by the root's infinite slope.
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squares)))


def similarity(video: Float[Array, "b t e"], text: Float[Array, "c e"]) -> Float[Array, "b c"]:
    """Average, over a clip's frames, the inner product with each text."""
    # The mean of the frames first: the product is linear, so one product stands for one a frame.
    return video.mean(axis=1) @ text.T


def same_shard(num_rows: int, shards: int) -> Bool[Array, "b b"]:
    """Compare rows of a batch: True where both lie in the same of `shards` contiguous parts."""
    shard = jnp.arange(num_rows) // (num_rows // shards)
    return shard[:, None] == shard[None, :]


def contrastive_loss(
    logits: Float[Array, "b b"],
    media_ids: Int[Array, " b"],
    valid: Bool[Array, " b"],
    shards: int = 1,
) -> Float[Array, ""]:
    """Compute the symmetric cross-entropy of clips (rows) and texts (columns); SMAUG's VTC.

    All pairs of equal media id are positives and share the target equally. Invalid rows are
    neither queries nor candidates. With `shards`, rows are compared within their own shard only.
    """
    pair, positive = compared_pairs(media_ids, valid, shards)
    # Clips of one id are right answers to each other's texts; as negatives they would teach the
    # model to tell apart what is the same.
    targets = positive / jnp.maximum(positive.sum(axis=1, keepdims=True), 1)

    def one_way(logits: Array) -> Array:
        logits = jnp.where(pair, logits, NEVER)
        log_p = jax.nn.log_softmax(logits, axis=1)
        return masked_mean(-(targets * log_p).sum(axis=1), valid)

    # Clip to text and text to clip, each normalized on its own (CLIP).
    return (one_way(logits) + one_way(logits.T)) / 2


def sigmoid_loss(
    logits: Float[Array, "b b"],
    media_ids: Int[Array, " b"],
    valid: Bool[Array, " b"],
    shards: int = 1,
) -> Float[Array, ""]:
    """Decide of each pair of a clip and a text whether they belong together (SigLIP).

    The binary cross-entropy of all pairs, summed, over the number of valid rows (Zhai et al. 2023,
    "Sigmoid Loss for Language Image Pre-Training", equation 2 and algorithm 1). All pairs of equal
    media id are positives; for invalid rows and `shards` see `contrastive_loss`.
    """
    pair, positive = compared_pairs(media_ids, valid, shards)
    # Zero before the sigmoid: the gradient of a masked infinity would be NaN.
    signed = jnp.where(pair, jnp.where(positive, logits, -logits), 0.0)
    return -jnp.where(pair, jax.nn.log_sigmoid(signed), 0.0).sum() / jnp.maximum(valid.sum(), 1)


def compared_pairs(
    media_ids: Int[Array, " b"], valid: Bool[Array, " b"], shards: int
) -> tuple[Bool[Array, "b b"], Bool[Array, "b b"]]:
    """Mark the pairs of rows that VTC compares, and the positives among them.

    Compared are valid rows of the same shard; positives have the same media id.
    """
    # Masked and not sliced: shapes stay static, and rows stay on their devices.
    pair = valid[:, None] & valid[None, :] & same_shard(len(valid), shards)
    return pair, pair & (media_ids[:, None] == media_ids[None, :])


class Negatives(NamedTuple):
    """Hard negative of each row."""

    index: Int[Array, " b"]  # type: ignore[assignment]  # hides tuple.index
    exists: Bool[Array, " b"]  # False where no row qualifies


def mine_negatives(
    key: Key[Array, ""],
    logits: Float[Array, "b b"],
    media_ids: Int[Array, " b"],
    valid: Bool[Array, " b"],
    shards: int = 1,
) -> Negatives:
    """Draw one column a row from softmax(logits), never one of equal media id or an invalid one.

    This is the hard-negative mining of ALBEF, which SMAUG's base uses. With `shards`, a row's
    negative lies in its own shard.
    """
    allowed = (media_ids[:, None] != media_ids[None, :]) & valid[None, :]
    allowed &= same_shard(len(valid), shards)  # a negative's tokens then stay on its device
    index = jax.random.categorical(key, jnp.where(allowed, logits, NEVER), axis=1)
    return Negatives(index, allowed.any(axis=1) & valid)


def cross_entropy(
    logits: Float[Array, "*b c"], labels: Int[Array, "*b"], mask: Bool[Array, "*b"]
) -> Float[Array, "*b"]:
    """Compute the cross-entropy of each element; log(classes) where `mask` is False.

    Logits of masked elements may be infinite or NaN, and get no gradient.
    """
    log_p = jax.nn.log_softmax(jnp.where(mask[..., None], logits, 0.0), axis=-1)
    # A comparison, which XLA fuses both ways: the gradient of a gather is scattered into zeros of
    # the shape of the logits, the largest array of a step.
    is_label = labels[..., None] == jnp.arange(logits.shape[-1])
    return -jnp.where(is_label, log_p, 0.0).sum(axis=-1)


class MaskedTokens(NamedTuple):
    """Token ids of texts of which some are masked."""

    ids: Int[Array, "b l"]
    targets_mask: Bool[Array, "b l"]  # True where the original token is to be predicted


def mask_tokens(
    key: Key[Array, ""],
    ids: Int[Array, "b l"],
    maskable: Bool[Array, "b l"],
    *,
    ratio: float,
    mask_id: int,
    vocab_size: int,
) -> MaskedTokens:
    """Mask as BERT does: of the chosen tokens 80 % become [MASK], 10 % a random one, 10 % stay.

    Args:
      key: random key.
      ids: token ids.
      maskable: True where a token may be chosen (never [PAD] or [CLS]).
      ratio: probability that a maskable token is chosen.
      mask_id: id of [MASK].
      vocab_size: random tokens are drawn from [0, vocab_size).
    """
    # Three keys: which token, what becomes of it, and the random word are independent.
    choose_key, fate_key, word_key = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(choose_key, ratio, ids.shape) & maskable
    fate = jax.random.uniform(fate_key, ids.shape)
    random_ids = jax.random.randint(word_key, ids.shape, 0, vocab_size, ids.dtype)
    # A share of random and unchanged tokens, so that the encoder cannot rely on [MASK], which
    # finetuning never shows it.
    hidden = jnp.where(fate < 0.8, mask_id, jnp.where(fate < 0.9, random_ids, ids))
    return MaskedTokens(jnp.where(chosen, hidden, ids), chosen)


def normalize_patches(patches: Float[Array, "*b n p"]) -> Float[Array, "*b n p"]:
    """Normalize each patch to zero mean and unit variance (unbiased, + 1e-6), MAE's target."""
    mean = patches.mean(axis=-1, keepdims=True)
    # Unbiased, as torch's `var` in MAE's own target.
    variance = patches.var(axis=-1, keepdims=True, ddof=1)
    return (patches - mean) / jnp.sqrt(variance + 1e-6)


def reconstruction_loss(
    predicted: Float[Array, "b t s p"],
    target: Float[Array, "b t s p"],
    mask: Bool[Array, "b t s"],
) -> Float[Array, ""]:
    """Average the squared error over the patches in `mask`, the removed ones; SMAUG's MVM."""
    # Zero before the square: the gradient of a masked infinity would be NaN.
    difference = jnp.where(mask[..., None], predicted - target, 0.0)
    return masked_mean(jnp.square(difference).mean(axis=-1), mask)
