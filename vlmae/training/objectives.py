"""Training objectives: plain functions of (bound model, features, context) -> Loss.

To add one: a function here and its line in `FUNCTIONS`, its needs in
`vlmae.config.objectives.OBJECTIVES`, and its weight in `ObjectivesConfig`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ObjectivesConfig
from vlmae.models.scoring import answer_log_probs, choice_logits
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops import losses, multiple_choice
from vlmae.ops.registry import Registry
from vlmae.training.features import Context, Features, Loss, extract, keys_of
from vlmae.training.pairs import fuse_pairs, vtc, vtm

Function = Callable[[VideoLanguageModel, Features, Context], Loss]


def mlm(model: VideoLanguageModel, features: Features, context: Context) -> Loss:
    """Masked language modeling: masked tokens from the other tokens and the video (BERT)."""
    ids, mask = context.batch.text_ids, features.masked_tokens.targets_mask
    fused = features.fused.masked_text  # by `fuse_pairs`, in one pass with VTM's pairs
    logits = model.predict_words(model.fused_words(features.masked_text, fused))
    correct = (logits.argmax(axis=-1) == ids).astype(jnp.float32)
    return Loss(
        losses.masked_mean(losses.cross_entropy(logits, ids, mask), mask),
        {"mlm/accuracy": losses.masked_mean(correct, mask)},
        mask.sum(),
    )


def mvm(model: VideoLanguageModel, features: Features, context: Context) -> Loss:
    """Masked visual modeling: pixels of the removed patches (MAE, as SMAUG uses it)."""
    video, batch = features.video, context.batch
    target = jax.lax.stop_gradient(model.patches(batch.video))
    prediction = model.decode_pixels(video)
    if prediction.patch_ids.shape != video.removed_mask.shape:  # only some patches are decoded
        target = jnp.take_along_axis(target, prediction.patch_ids[..., None], axis=2)
    if model.config.pixel_decoder.normalize_target:
        target = losses.normalize_patches(target)
    removed = jnp.take_along_axis(video.removed_mask, prediction.patch_ids, axis=2)
    mask = removed & batch.valid[:, None, None]
    return Loss(losses.reconstruction_loss(prediction.pixels, target, mask), {}, mask.sum())


def mcm(model: VideoLanguageModel, features: Features, context: Context) -> Loss:
    """Multiple choice modeling: the true caption among negatives (MuLTI).

    Negatives come with the batch, or are captions of its other rows. A row with too few of them
    has no question; `mcm/valid_ratio` is the fraction of rows that have one, and `mcm/cut_ratio`
    that of questions whose options are too long for `mcm_len`.
    """
    options, answer, mask = draw_options(context.batch, context.key, context.config)
    logits = choice_logits(model, features.video, options, context.config)
    loss = _classification_loss("mcm", logits, answer, mask, context.batch.valid)
    if context.config.mcm_kind == "concat":
        template, max_len = context.config.mcm_template_ids, context.config.mcm_len
        cut = multiple_choice.are_cut(template, options, max_len)
        cut_ratio = losses.masked_mean(cut.astype(jnp.float32), mask)
        loss = loss._replace(metrics=loss.metrics | {"mcm/cut_ratio": cut_ratio})
    return loss


def draw_options(
    batch: Batch, key: Key[Array, ""], config: ObjectivesConfig
) -> tuple[multiple_choice.Caption, Int[Array, " b"], Bool[Array, " b"]]:
    """Draw the options of each row, the index of the truth (uniform), and a mask of rows.

    The mask is True for rows with enough negatives.
    """
    answer_key, noise_key = jax.random.split(key)
    count = config.mcm_template.count("{}")
    b = len(batch.valid)
    if batch.other_ids is None:  # the data give no negatives, so other rows are
        noise = jax.random.uniform(noise_key, (b, b))
        rows, mask = multiple_choice.negative_rows(
            noise, batch.text_ids, batch.media_ids, batch.valid, count - 1
        )
        negatives = multiple_choice.Caption(batch.text_ids[rows], batch.text_mask[rows])
    else:
        negatives = multiple_choice.Caption(batch.other_ids, batch.other_mask)
        mask = negatives.mask.any(axis=2).all(axis=1) & batch.valid
    answer = jax.random.randint(answer_key, (b,), 0, count)
    truth = multiple_choice.Caption(batch.text_ids, batch.text_mask)
    return multiple_choice.insert_truth(truth, negatives, answer), answer, mask


def answer(model: VideoLanguageModel, features: Features, context: Context) -> Loss:
    """Open-ended question answering, by a classifier (MuLTI) or a decoder (SMAUG).

    With the classifier a question whose answer is no class has no target; `answer/valid_ratio` is
    the fraction of questions that have one.
    """
    batch, fused = context.batch, model.fuse(features.video, features.text)
    if context.config.answer_kind == "decoder":
        answers = multiple_choice.Caption(
            batch.answer_ids, batch.answer_mask & batch.valid[:, None]
        )
        log_p = answer_log_probs(model, answers, features.text, fused)
        return Loss(-losses.masked_mean(log_p, batch.valid), {}, batch.valid.sum())
    target, mask = batch.targets.argmax(axis=1), batch.targets.any(axis=1) & batch.valid
    return _classification_loss("answer", model.classify(fused), target, mask, batch.valid)


def label(model: VideoLanguageModel, features: Features, context: Context) -> Loss:
    """Multi-label classification: binary cross-entropy, the mean over the classes (MuLTI)."""
    batch = context.batch
    logits = model.classify(model.fuse(features.video, features.text))
    logits = jnp.where(batch.valid[:, None], logits, 0.0)  # see `losses.cross_entropy`
    values = optax.sigmoid_binary_cross_entropy(logits, batch.targets).mean(axis=1)
    return Loss(losses.masked_mean(values, batch.valid), {}, batch.valid.sum())


def _classification_loss(
    name: str,
    logits: Float[Array, "b c"],
    target: Int[Array, " b"],
    mask: Bool[Array, " b"],
    valid: Bool[Array, " b"],
) -> Loss:
    """Cross-entropy over the rows of `mask`, with accuracy and the fraction of `valid` rows."""
    correct = (logits.argmax(axis=-1) == target).astype(jnp.float32)
    return Loss(
        losses.masked_mean(losses.cross_entropy(logits, target, mask), mask),
        {
            f"{name}/accuracy": losses.masked_mean(correct, mask),
            f"{name}/valid_ratio": losses.masked_mean(mask.astype(jnp.float32), valid),
        },
        mask.sum(),
        {f"{name}/valid_ratio": valid.sum()},
    )


FUNCTIONS = Registry[Function](
    "objective function",
    {
        "vtc": vtc,
        "vtm": vtm,
        "mlm": mlm,
        "mvm": mvm,
        "mcm": mcm,
        "answer": answer,
        "label": label,
    },
)


def compute_losses(
    model: VideoLanguageModel,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
    functions: Mapping[str, Function] = FUNCTIONS,
    scales: Mapping[str, Array | float] | None = None,
) -> Loss:
    """Compute the weighted sum of all objectives of non-zero weight, and metrics.

    Metrics hold `loss/NAME` of each objective, `loss/total`, the objectives' own metrics, and
    tokens per clip and per caption; `weights` has the weight of each but the total. `shards` is the
    number of parts into which devices split the batch, the scope of "local". `functions` are the
    objectives by name; GradCache replaces one of them, see `vlmae.training.gradients`. `scales` are
    the weights by which the losses are summed where those are inputs of a compiled program; None:
    the config's.

    Raises:
      ValueError: an objective of non-zero weight has no function.
    """
    keys = keys_of(key)
    # Encoders and fusion run once for all objectives: they are most of a step's cost.
    features = extract(model, batch, keys, config)
    features = fuse_pairs(model, features, Context(batch, keys["vtm"], config, shards))
    total, metrics, weights = jnp.zeros(()), {}, {}
    scales = config.weights if scales is None else scales
    for name in config.weights:  # in the order of the registry, which a program's inputs have not
        loss = functions[name](model, features, Context(batch, keys[name], config, shards))
        total += scales[name] * loss.value  # float32, whatever the activations are
        found = {f"loss/{name}": loss.value, **loss.metrics}
        metrics |= found
        weights |= dict.fromkeys(found, loss.weight) | dict(loss.weights)
    frames, kept = features.video.patch_ids.shape[1:]
    metrics |= {
        "loss/total": total,
        "tokens/video_kept": jnp.asarray(frames * kept, jnp.float32),
        "tokens/text": losses.masked_mean(features.text.mask.sum(axis=-1) * 1.0, batch.valid),
        "data/bad_ratio": (~batch.valid).mean(),
    }
    weights |= {
        "tokens/video_kept": 1.0,
        "tokens/text": batch.valid.sum(),
        "data/bad_ratio": 1.0,
    }
    return Loss(total, metrics, weights=weights)
