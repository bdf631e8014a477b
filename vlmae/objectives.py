"""The training objectives: plain functions of (bound model, features, batch, key) -> Loss."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int, Key

from data_pipelines.records import Batch
from vlmae import choices, losses
from vlmae.config import ObjectivesConfig
from vlmae.masking import PatchMask, mask_from_noise, mask_noise
from vlmae.models.layers import take_rows
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.scoring import answer_log_probs, choice_logits


class Features(NamedTuple):
    """What the encoders made of a batch; shared by all objectives."""

    video: VideoFeatures
    text: TextFeatures  # of the caption; of the masked one unless an objective `reads_caption`
    words: losses.MaskedWords | None = None  # the masked caption; None without MLM
    masked_text: TextFeatures | None = None
    fused: "Fused | None" = None  # see `fuse_texts`


class Fused(NamedTuple):
    """What the fusion made of a batch for VTM and MLM, in one pass."""

    pairs: Float[Array, "b 3 q d"] | None  # as it is, with a hard video, with a hard text
    counted: Bool[Array, "b 3"] | None  # the pairs that there are
    words: Float[Array, "b q d"] | None  # the masked caption with its own video


class Embeddings(NamedTuple):
    """All that VTC knows of a batch."""

    video: Float[Array, "b t e"]  # unit vectors
    text: Float[Array, "b e"]
    temperature: Float[Array, ""]


class Loss(NamedTuple):
    """A scalar to minimize and what to report beside it."""

    value: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


def sample_mask(model: VideoLanguageModel, batch: Batch, key: Key[Array, ""]) -> PatchMask | None:
    """The visual mask of a training batch, or None if the config removes nothing."""
    config = model.config.video.mask
    if config.scheme == "none" or config.ratio == 0:
        return None
    rows, frames = batch.video.shape[:2]
    shape = (rows, model.num_times(frames), *model.grid)
    return mask_from_noise(mask_noise(key, config.scheme, config.ratio, shape), config.ratio)


def hide_words(
    model: VideoLanguageModel, batch: Batch, key: Key[Array, ""], config: ObjectivesConfig
) -> losses.MaskedWords:
    """The captions with some words hidden; never [CLS], padding, or those of padding rows."""
    text = model.config.text
    return losses.mask_words(
        key,
        batch.text_ids,
        batch.text_mask & batch.valid[:, None] & (batch.text_ids != text.cls_id),
        ratio=config.mlm_ratio,
        mask_id=text.mask_id,
        vocab_size=text.vocab_size,
    )


def extract(
    model: VideoLanguageModel,
    batch: Batch,
    mask_key: Key[Array, ""],
    word_key: Key[Array, ""],
    config: ObjectivesConfig,
) -> Features:
    """Encodes a batch: the video through a fresh mask, the text as it is and with hidden words."""
    video = model.encode_video(batch.video, sample_mask(model, batch, mask_key))
    if not config.mlm:
        return Features(video, model.encode_text(batch.text_ids, batch.text_mask))
    words = hide_words(model, batch, word_key, config)
    if not config.reads_caption:
        text = model.encode_text(words.ids, batch.text_mask)
        return Features(video, text, words, text)
    # One pass for both: half the program, and gradients of one use to sum over devices. The two
    # texts of a row stay together, so that they stay on the row's device.
    ids = rearrange([batch.text_ids, words.ids], "c b l -> (b c) l")
    both = model.encode_text(ids, repeat(batch.text_mask, "b l -> (b c) l", c=2))
    text, masked = map(TextFeatures, *(rearrange(x, "(b c) ... -> c b ...", c=2) for x in both))
    return Features(video, text, words, masked)


def embed(model: VideoLanguageModel, features: Features) -> Embeddings:
    """What VTC compares."""
    video, text = model.embed_video(features.video), model.embed_text(features.text)
    return Embeddings(video, text, model.temperature())


def vtc_logits(embeddings: Embeddings) -> Float[Array, "b b"]:
    """Similarity of every clip (rows) with every text (columns), over the temperature."""
    return losses.similarity(embeddings.video, embeddings.text) / embeddings.temperature


def vtc(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
) -> Loss:
    """Video-text contrastive loss over the global batch, or within each shard (SMAUG)."""
    return contrast(embed(model, features), batch, config, shards)


def contrast(
    embeddings: Embeddings, batch: Batch, config: ObjectivesConfig, shards: int = 1
) -> Loss:
    """VTC by the embeddings of a batch alone; only its media ids and valid rows are read."""
    logits = vtc_logits(embeddings)
    compared = shards if config.vtc_scope == "local" else 1
    value = losses.contrastive_loss(logits, batch.media_ids, batch.valid, compared)
    best = jnp.where(batch.valid[None, :], logits, losses.NEVER).argmax(axis=1)
    correct = (batch.media_ids[best] == batch.media_ids).astype(jnp.float32)
    accuracy = losses.masked_mean(correct, batch.valid)
    return Loss(value, {"vtc/accuracy": accuracy, "vtc/temperature": embeddings.temperature})


def fuse_texts(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
) -> Features:
    """Fuses all that VTM and MLM read of a batch, at once.

    VTM's negatives come from within each shard or from the global batch; of a batch that is
    computed in parts, from the row's own part, whose similarities alone are at hand together with
    all tokens. Where both read the same caption, VTM's right pair is what MLM reads.
    """
    if not config.vtm:
        words = model.fuse(features.masked_text, features.video) if config.mlm else None
        return features._replace(fused=Fused(None, None, words))
    shards = shards if config.vtm_scope == "local" else 1
    text, video = hard_negatives(model, features, batch, key, config, shards)
    hard_rows = rows_of_parts(text.index[:, None], shards)
    hard_text = jax.tree.map(lambda x: take_rows(x, hard_rows), features.text)

    own = jnp.arange(len(batch.valid))
    pairs = [(features.text, own), (features.text, video.index), (hard_text, own)]
    has_words = config.mlm and config.reads_caption
    pairs += [(features.masked_text, own)] if has_words else []
    texts, videos = zip(*pairs, strict=True)
    # The pairs of a row stay together, so that they stay on the row's device.
    texts = jax.tree.map(lambda *x: rearrange([*x], "c b ... -> (b c) ..."), *texts)
    fused = model.fuse(texts, features.video, rows_of_parts(jnp.stack(videos, axis=1), shards))
    fused = rearrange(fused, "(b c) q d -> b c q d", c=len(pairs))
    counted = jnp.stack([batch.valid, video.exists, text.exists], axis=1)
    words = fused[:, -1 if has_words else 0] if config.mlm else None
    return features._replace(fused=Fused(fused[:, :3], counted, words))


def vtm(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
) -> Loss:
    """Video-text matching: each pair as it is, with a hard video, with a hard text (SMAUG).

    A row without any possible negative counts only as a positive.
    """
    scores = model.match(rearrange(features.fused.pairs, "b c q d -> (b c) q d"))
    labels = jnp.tile(jnp.array([1, 0, 0]), len(batch.valid))
    counted = features.fused.counted.ravel()
    correct = (scores.argmax(axis=-1) == labels).astype(jnp.float32)
    return Loss(
        losses.masked_mean(losses.cross_entropy(scores, labels), counted),
        {"vtm/accuracy": losses.masked_mean(correct, counted)},
    )


def hard_negatives(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
) -> tuple[losses.Negatives, losses.Negatives]:
    """A wrong text for each clip and a wrong clip for each text, like the right ones.

    They are mined by the contrastive similarities, or uniformly where VTC is off.
    """
    b = len(batch.valid)
    video_key, text_key = jax.random.split(key)
    logits = vtc_logits(embed(model, features)) if config.vtc else jnp.zeros((b, b))
    logits = jax.lax.stop_gradient(logits)
    text = losses.mine_negatives(text_key, logits, batch.media_ids, batch.valid, shards)
    video = losses.mine_negatives(video_key, logits.T, batch.media_ids, batch.valid, shards)
    return text, video


def mlm(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
) -> Loss:
    """Masked language modeling: hidden words from the other words and the video (BERT)."""
    words = features.words
    logits = model.predict_words(model.fused_words(features.masked_text, features.fused.words))
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
    shards: int = 1,
) -> Loss:
    """Masked visual modeling: the pixels of the removed patches (MAE, as SMAUG uses it)."""
    target = jax.lax.stop_gradient(model.patches(batch.video))
    painted = model.decode_pixels(features.video)
    if painted.places.shape != features.video.removed_mask.shape:
        target = jnp.take_along_axis(target, painted.places[..., None], axis=2)
    if model.config.pixel_decoder.normalize_target:
        target = losses.normalize_patches(target)
    removed = jnp.take_along_axis(features.video.removed_mask, painted.places, axis=2)
    counted = removed & batch.valid[:, None, None]
    return Loss(losses.reconstruction_loss(painted.pixels, target, counted), {})


def mcm(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
) -> Loss:
    """Multiple choice modeling: the true caption among wrong ones (MuLTI).

    The wrong ones come with the batch, or from its other rows. A row for which there are too few
    is not asked; `mcm/asked_ratio` is the share of those that are.
    """
    options, answer, asked = draw_options(batch, key, config)
    logits = choice_logits(model, options, features.video, config)
    correct = (logits.argmax(axis=-1) == answer).astype(jnp.float32)
    return Loss(
        losses.masked_mean(losses.cross_entropy(logits, answer), asked),
        {
            "mcm/accuracy": losses.masked_mean(correct, asked),
            "mcm/asked_ratio": losses.masked_mean(asked.astype(jnp.float32), batch.valid),
        },
    )


def draw_options(
    batch: Batch, key: Key[Array, ""], config: ObjectivesConfig
) -> tuple[choices.Caption, Int[Array, " b"], Bool[Array, " b"]]:
    """The options of each row, the place of the truth (uniform), and which rows can be asked."""
    place_key, noise_key = jax.random.split(key)
    count = config.mcm_template.count("{}")
    b = len(batch.valid)
    if batch.other_ids is None:
        noise = jax.random.uniform(noise_key, (b, b))
        rows, asked = choices.other_rows(
            noise, batch.text_ids, batch.media_ids, batch.valid, count - 1
        )
        others = choices.Caption(batch.text_ids[rows], batch.text_mask[rows])
    else:
        others = choices.Caption(batch.other_ids, batch.other_mask)
        asked = others.mask.any(axis=2).all(axis=1) & batch.valid
    answer = jax.random.randint(place_key, (b,), 0, count)
    truth = choices.Caption(batch.text_ids, batch.text_mask)
    return choices.insert_truth(truth, others, answer), answer, asked


def answer(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
) -> Loss:
    """Open-ended question answering, by a classifier or by a decoder (`answer_kind`)."""
    fused = model.fuse(features.text, features.video)
    if config.answer_kind == "decoder":
        answers = choices.Caption(batch.answer_ids, batch.answer_mask)
        log_p = answer_log_probs(model, answers, features.text, fused)
        return Loss(-losses.masked_mean(log_p, batch.valid), {})
    return _classify_answer(model.classify(fused), batch)


def _classify_answer(logits: Float[Array, "b c"], batch: Batch) -> Loss:
    """Cross-entropy over all answers (MuLTI).

    A question whose answer is no class is not asked; `answer/asked_ratio` is the share of the
    others.
    """
    right, asked = batch.targets.argmax(axis=1), batch.targets.any(axis=1) & batch.valid
    correct = (logits.argmax(axis=-1) == right).astype(jnp.float32)
    return Loss(
        losses.masked_mean(losses.cross_entropy(logits, right), asked),
        {
            "answer/accuracy": losses.masked_mean(correct, asked),
            "answer/asked_ratio": losses.masked_mean(asked.astype(jnp.float32), batch.valid),
        },
    )


def label(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
) -> Loss:
    """Multi-label classification: the mean binary cross-entropy of the classes (MuLTI)."""
    logits = model.classify(model.fuse(features.text, features.video))
    values = optax.sigmoid_binary_cross_entropy(logits, batch.targets).mean(axis=1)
    return Loss(losses.masked_mean(values, batch.valid), {})


OBJECTIVES: dict[str, Callable[..., Loss]] = {
    "vtc": vtc,
    "vtm": vtm,
    "mlm": mlm,
    "mvm": mvm,
    "mcm": mcm,
    "answer": answer,
    "label": label,
}


def compute_losses(
    model: VideoLanguageModel,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
    objectives: Mapping[str, Callable[..., Loss]] = OBJECTIVES,
) -> Loss:
    """The weighted sum of all objectives of non-zero weight, and everything worth logging.

    Metrics hold `loss/NAME` for each objective, `loss/total`, the objectives' own metrics, and
    the tokens that a clip and a caption cost. `shards` is the number of parts into which devices
    cut the batch: the scope of what is "local". `objectives` are the functions by name;
    `gradients.share_of_vtc` takes the place of one.
    """
    keys = keys_of(key)
    features = extract(model, batch, keys["mask"], keys["mlm"], config)
    features = fuse_texts(model, features, batch, keys["vtm"], config, shards)
    total, metrics = jnp.zeros(()), {}
    for name, objective in objectives.items():
        if weight := getattr(config, name):
            loss = objective(model, features, batch, keys[name], config, shards)
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


def keys_of(key: Key[Array, ""]) -> dict[str, Key[Array, ""]]:
    """The key of the visual mask ("mask") and of each objective."""
    names = ("mask", *OBJECTIVES)
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))


def rows_of_parts(rows: Int[Array, "b c"], shards: int) -> Int[Array, "s n"]:
    """Rows of a batch, counted within their shards, for `take_rows`.

    Row r asks for rows of its own shard only.
    """
    return rearrange(rows, "(s r) c -> s (r c)", s=shards) % (len(rows) // shards)
