"""The training objectives: plain functions of (bound model, features, batch, key) -> Loss."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from data_pipelines.records import Batch
from vlmae import losses
from vlmae.config import ObjectivesConfig
from vlmae.masking import PatchMask, mask_from_noise, mask_noise
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel


class Features(NamedTuple):
    """What the encoders made of a batch; shared by all objectives."""

    video: VideoFeatures
    text: TextFeatures


class Loss(NamedTuple):
    """A scalar to minimize and what to report beside it."""

    value: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


def sample_mask(model: VideoLanguageModel, batch: Batch, key: Key[Array, ""]) -> PatchMask | None:
    """The visual mask of a training batch, or None if the config removes nothing."""
    config = model.config.video.mask
    if config.scheme == "none" or config.ratio == 0:
        return None
    shape = (*batch.video.shape[:2], *model.grid)
    return mask_from_noise(mask_noise(key, config.scheme, config.ratio, shape), config.ratio)


def extract(model: VideoLanguageModel, batch: Batch, key: Key[Array, ""]) -> Features:
    """Encodes a batch, the video through a fresh mask."""
    return Features(
        model.encode_video(batch.video, sample_mask(model, batch, key)),
        model.encode_text(batch.text_ids, batch.text_mask),
    )


def vtc_logits(model: VideoLanguageModel, features: Features) -> Float[Array, "b b"]:
    """Similarity of every clip (rows) with every text (columns), over the temperature."""
    video, text = model.embed_video(features.video), model.embed_text(features.text)
    return losses.similarity(video, text) / model.temperature()


def vtc(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
) -> Loss:
    """Video-text contrastive loss over the global batch (SMAUG, objectives)."""
    logits = vtc_logits(model, features)
    value = losses.contrastive_loss(logits, batch.media_ids, batch.valid)
    best = jnp.where(batch.valid[None, :], logits, losses.NEVER).argmax(axis=1)
    correct = (batch.media_ids[best] == batch.media_ids).astype(jnp.float32)
    accuracy = losses.masked_mean(correct, batch.valid)
    return Loss(value, {"vtc/accuracy": accuracy, "vtc/temperature": model.temperature()})


def vtm(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
) -> Loss:
    """Video-text matching: each pair as it is, with a hard video, with a hard text (SMAUG).

    Negatives are mined over the global batch by the contrastive similarities, or uniformly where
    VTC is off. A row without any possible negative counts only as a positive.
    """
    b = len(batch.valid)
    video_key, text_key = jax.random.split(key)
    logits = vtc_logits(model, features) if config.vtc else jnp.zeros((b, b))
    logits = jax.lax.stop_gradient(logits)
    text = losses.mine_negatives(text_key, logits, batch.media_ids, batch.valid)
    video = losses.mine_negatives(video_key, logits.T, batch.media_ids, batch.valid)

    own = jnp.arange(b)
    text_rows = jnp.concatenate([own, own, text.index])
    video_rows = jnp.concatenate([own, video.index, own])
    fused = model.fuse(take(features.text, text_rows), take(features.video, video_rows))
    scores = model.match(fused)
    labels = jnp.concatenate([jnp.ones(b, int), jnp.zeros(2 * b, int)])
    counted = jnp.concatenate([batch.valid, video.exists, text.exists])
    correct = (scores.argmax(axis=-1) == labels).astype(jnp.float32)
    return Loss(
        losses.masked_mean(losses.cross_entropy(scores, labels), counted),
        {"vtm/accuracy": losses.masked_mean(correct, counted)},
    )


def mlm(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
) -> Loss:
    """Masked language modeling: hidden words from the other words and the video (BERT)."""
    text = model.config.text
    maskable = batch.text_mask & batch.valid[:, None] & (batch.text_ids != text.cls_id)
    words = losses.mask_words(
        key,
        batch.text_ids,
        maskable,
        ratio=config.mlm_ratio,
        mask_id=text.mask_id,
        vocab_size=text.vocab_size,
    )
    fused = model.fuse(model.encode_text(words.ids, batch.text_mask), features.video)
    logits = model.predict_words(fused)
    correct = (logits.argmax(axis=-1) == batch.text_ids).astype(jnp.float32)
    return Loss(
        losses.masked_mean(losses.cross_entropy(logits, batch.text_ids), words.targets_mask),
        {"mlm/accuracy": losses.masked_mean(correct, words.targets_mask)},
    )


def mvm(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
) -> Loss:
    """Masked visual modeling: the pixels of the removed patches (MAE, as SMAUG uses it)."""
    target = jax.lax.stop_gradient(model.patches(batch.video))
    if model.config.pixel_decoder.normalize_target:
        target = losses.normalize_patches(target)
    counted = features.video.removed_mask & batch.valid[:, None, None]
    return Loss(
        losses.reconstruction_loss(model.decode_pixels(features.video), target, counted), {}
    )


OBJECTIVES: dict[str, Callable[..., Loss]] = {"vtc": vtc, "vtm": vtm, "mlm": mlm, "mvm": mvm}


def compute_losses(
    model: VideoLanguageModel, batch: Batch, key: Key[Array, ""], config: ObjectivesConfig
) -> Loss:
    """The weighted sum of all objectives of non-zero weight, and everything worth logging.

    Metrics hold `loss/NAME` for each objective, `loss/total`, the objectives' own metrics, and
    the tokens that a clip and a caption cost.
    """
    mask_key, *keys = jax.random.split(key, 1 + len(OBJECTIVES))
    features = extract(model, batch, mask_key)
    total, metrics = jnp.zeros(()), {}
    for objective_key, (name, objective) in zip(keys, OBJECTIVES.items(), strict=True):
        if weight := getattr(config, name):
            loss = objective(model, features, batch, objective_key, config)
            total += weight * loss.value
            metrics |= {f"loss/{name}": loss.value, **loss.metrics}
    frames, kept = features.video.places.shape[1:]
    metrics |= {
        "loss/total": total,
        "tokens/video_kept": jnp.asarray(frames * kept, jnp.float32),
        "tokens/text": losses.masked_mean(features.text.mask.sum(axis=-1) * 1.0, batch.valid),
        "data/bad_ratio": (~batch.valid).mean(),
    }
    return Loss(total, metrics)


def take(features: PyTree, rows: Int[Array, " c"]) -> PyTree:
    """The given rows of every array in `features`."""
    return jax.tree.map(lambda x: x[rows], features)
