"""Objectives that compare clips with texts: contrastive learning (VTC), and matching (VTM)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ObjectivesConfig
from vlmae.models.attention import take_rows
from vlmae.models.video_language import INITIAL_TEMPERATURE, VideoLanguageModel
from vlmae.ops import losses
from vlmae.ops.registry import Registry
from vlmae.training.features import Context, Features, FusedPairs, Loss


class VtcLoss(NamedTuple):
    """A loss of the similarities of a batch, and the values that its scalars start from."""

    function: Callable[..., Array]  # (logits, media ids, valid rows, shards) -> loss
    temperature: float
    bias: float | None = None  # None: the loss learns none


# SigLIP multiplies by exp(t'), which is 10 at first: a temperature of 0.1. Its bias lets a batch of
# almost only negatives begin with a small loss.
VTC_LOSSES = Registry[VtcLoss](
    "VTC loss",
    {
        "softmax": VtcLoss(losses.contrastive_loss, INITIAL_TEMPERATURE),
        "sigmoid": VtcLoss(losses.sigmoid_loss, temperature=0.1, bias=-10.0),
    },
)


class Embeddings(NamedTuple):
    """Vectors of a batch in the shared space; VTC reads nothing else of the model."""

    video: Float[Array, "b t e"]  # unit vectors
    text: Float[Array, "b e"]
    temperature: Float[Array, ""]
    bias: Float[Array, ""] | None = None  # of the sigmoid loss


def embed(model: VideoLanguageModel, features: Features, config: ObjectivesConfig) -> Embeddings:
    """Project features into the shared contrastive space."""
    video, text = model.embed_video(features.video), model.embed_text(features.text)
    kind = VTC_LOSSES[config.vtc_loss]
    bias = None if kind.bias is None else model.logit_bias(kind.bias)
    return Embeddings(video, text, model.temperature(kind.temperature), bias)


def vtc_logits(embeddings: Embeddings) -> Float[Array, "b b"]:
    """Compute similarities of clips (rows) and texts (columns) over the temperature, plus bias."""
    logits = losses.similarity(embeddings.video, embeddings.text) / embeddings.temperature
    return logits if embeddings.bias is None else logits + embeddings.bias


def vtc(model: VideoLanguageModel, features: Features, context: Context) -> Loss:
    """Video-text contrastive loss over the global batch or within each shard (SMAUG)."""
    config = context.config
    return contrast(embed(model, features, config), context.batch, config, context.shards)


def scope_shards(scope: str, shards: int) -> int:
    """Return the number of parts of a batch that are compared apart: one in the global scope."""
    return shards if scope == "local" else 1


def contrast(
    embeddings: Embeddings, batch: Batch, config: ObjectivesConfig, shards: int = 1
) -> Loss:
    """Compute VTC from the embeddings of a batch; reads only its media ids and valid rows.

    `shards` is the number of parts of the batch, within which rows are compared in the scope local.
    """
    logits, valid = vtc_logits(embeddings), batch.valid
    shards = scope_shards(config.vtc_scope, shards)
    value = VTC_LOSSES[config.vtc_loss].function(logits, batch.media_ids, valid, shards)
    # Any caption of the same clip is a correct answer, as in the loss.
    best = jnp.where(valid[None, :], logits, losses.NEVER).argmax(axis=1)
    correct = (batch.media_ids[best] == batch.media_ids).astype(jnp.float32)
    metrics = {
        "vtc/accuracy": losses.masked_mean(correct, valid),
        "vtc/temperature": embeddings.temperature,
    }
    if embeddings.bias is not None:
        metrics["vtc/bias"] = embeddings.bias
    return Loss(value, metrics)


def hard_negatives(
    model: VideoLanguageModel, features: Features, context: Context
) -> tuple[losses.Negatives, losses.Negatives]:
    """Sample one hard negative text per clip, and one clip per text, by similarity (ALBEF).

    Less hard ones are drawn by the similarities times `vtm_hardness` (ours). Where VTC is not
    trained its similarities mean nothing, so the draw is uniform.
    """
    batch, b = context.batch, len(context.batch.valid)
    shards = scope_shards(context.config.vtm_scope, context.shards)
    video_key, text_key = jax.random.split(context.key)
    # Hard ones, by the current model (ALBEF): random negatives are soon too easy to learn from.
    config = context.config
    logits = vtc_logits(embed(model, features, config)) if config.vtc else jnp.zeros((b, b))
    logits *= config.vtm_hardness
    logits = jax.lax.stop_gradient(logits)  # a draw has no gradient; this saves its backward pass
    text = losses.mine_negatives(text_key, logits, batch.media_ids, batch.valid, shards)
    video = losses.mine_negatives(video_key, logits.T, batch.media_ids, batch.valid, shards)
    return text, video


def fuse_pairs(model: VideoLanguageModel, features: Features, context: Context) -> Features:
    """Fuse all pairs that VTM and MLM read, in one pass; `context.key` is VTM's.

    Negatives come from within each shard or from the global batch. In a batch that is computed in
    parts they come from the row's own part: only its similarities are at hand together with its
    tokens. Where VTM and MLM read the same caption, MLM reads VTM's matched pair.
    """
    config, batch = context.config, context.batch
    reads_masked = config.need("masked_text")
    # Without VTM only masked texts are fused, one pair a row.
    if not config.need("hard_pairs"):
        masked = model.fuse(features.video, features.masked_text) if reads_masked else None
        return features._replace(fused=FusedPairs(None, None, masked))
    text, video = hard_negatives(model, features, context)
    shards = scope_shards(config.vtm_scope, context.shards)
    # Rows within the shard, so that the gather of texts crosses no devices.
    hard_rows = rows_in_shards(text.index[:, None], shards)
    hard_text = jax.tree.map(lambda x: take_rows(x, hard_rows), features.text)

    # Hard texts are gathered here, but videos only by their rows inside the fusion, which projects
    # each clip's keys and values once for all its pairs.
    own = jnp.arange(len(batch.valid))
    pairs = [(features.text, own), (features.text, video.index), (hard_text, own)]
    has_masked_pair = reads_masked and config.reads_caption
    pairs += [(features.masked_text, own)] if has_masked_pair else []
    texts, videos = zip(*pairs, strict=True)
    # The pairs of a row stay neighbors, so that they stay on the row's device.
    texts = jax.tree.map(lambda *x: rearrange([*x], "c b ... -> (b c) ..."), *texts)
    tokens = model.fuse(features.video, texts, rows_in_shards(jnp.stack(videos, axis=1), shards))
    tokens = rearrange(tokens, "(b c) q d -> b c q d", c=len(pairs))
    # In the order of `pairs`: matched, with a hard video, with a hard text.
    mask = jnp.stack([batch.valid, video.exists, text.exists], axis=1)
    masked = tokens[:, -1 if has_masked_pair else 0] if reads_masked else None
    return features._replace(fused=FusedPairs(tokens[:, :3], mask, masked))


def vtm(model: VideoLanguageModel, features: Features, context: Context) -> Loss:
    """Video-text matching: each pair as it is, with a hard video, with a hard text (SMAUG).

    A row without any possible negative counts only as a positive.
    """
    scores = model.match(rearrange(features.fused.tokens, "b c q d -> (b c) q d"))
    # One positive and two negatives a row, unweighted, as in ALBEF.
    labels = jnp.tile(jnp.array([1, 0, 0]), len(context.batch.valid))  # in the order of `pairs`
    mask = features.fused.mask.ravel()
    correct = (scores.argmax(axis=-1) == labels).astype(jnp.float32)
    return Loss(
        losses.masked_mean(losses.cross_entropy(scores, labels, mask), mask),
        {"vtm/accuracy": losses.masked_mean(correct, mask)},
        mask.sum(),
    )


def rows_in_shards(rows: Int[Array, "b c"], shards: int) -> Int[Array, "s n"]:
    """Convert row numbers of a batch to numbers within each shard, as `take_rows` reads them.

    Row r may name only rows of its own shard, so nothing crosses devices.
    """
    return rearrange(rows, "(s r) c -> s (r c)", s=shards) % (len(rows) // shards)
