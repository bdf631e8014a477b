"""Scores that training and evaluation share: matches, options of questions, answers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, PyTree

from vlmae.config.experiment import ObjectivesConfig
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops import losses, multiple_choice
from vlmae.ops.registry import Registry


def match_scores(
    model: VideoLanguageModel, video: VideoFeatures, text: TextFeatures, ensemble: str = "concat"
) -> Float[Array, " b"]:
    """Score how well text i fits clip i: logit of a match minus logit of none.

    `ensemble` is one of `ENSEMBLES`: all frames at once, or each alone (Singularity's evaluation).
    """
    return ENSEMBLES[ensemble](model, video, text)


def match_clips(
    model: VideoLanguageModel, video: VideoFeatures, text: TextFeatures
) -> Float[Array, " b"]:
    """Score all frames of a clip at once."""
    # The difference of logits ranks like the probability, and does not saturate.
    logits = model.match(model.fuse(video, text))
    return logits[:, 1] - logits[:, 0]


def match_frames(
    combine: Callable[..., Array],
    model: VideoLanguageModel,
    video: VideoFeatures,
    text: TextFeatures,
) -> Float[Array, " b"]:
    """Score every frame as a clip of its own and combine the scores of a clip."""
    t = video.tokens.shape[1]
    scores = match_clips(model, video.frames_apart, repeat_rows(text, t))
    return combine(rearrange(scores, "(b t) -> b t", t=t), axis=1)


ENSEMBLES: Registry[Callable[..., Array]] = Registry(
    "frame ensemble",
    {
        "concat": match_clips,
        "mean": functools.partial(match_frames, jnp.mean),
        "max": functools.partial(match_frames, jnp.max),
        "lse": functools.partial(match_frames, jax.nn.logsumexp),
    },
)


def match_options(
    model: VideoLanguageModel,
    video: VideoFeatures,
    options: multiple_choice.Caption,
    ensemble: str = "concat",
) -> Float[Array, "b c"]:
    """Score how well each option matches its clip, by the matching head."""
    count = options.ids.shape[1]
    # Options are texts of a larger batch; copies of a row stay neighbors, so on its device.
    text = model.encode_text(*multiple_choice.fold(options))
    scores = match_scores(model, repeat_rows(video, count), text, ensemble)
    return rearrange(scores, "(b c) -> b c", c=count)


def choice_logits(
    model: VideoLanguageModel,
    video: VideoFeatures,
    options: multiple_choice.Caption,
    config: ObjectivesConfig,
) -> Float[Array, "b c"]:
    """Score the options of each clip by the head of MCM; `mcm_kind` is one of `CHOICES`."""
    return CHOICES[config.mcm_kind](model, video, options, config)


def choose_from_list(
    model: VideoLanguageModel,
    video: VideoFeatures,
    options: multiple_choice.Caption,
    config: ObjectivesConfig,
) -> Float[Array, "b c"]:
    """Put all options into one text, whose [CLS] classifies them (MuLTI)."""
    # Composed on the device, from ids: which options a row gets is drawn inside the step.
    question = multiple_choice.compose(config.mcm_template_ids, options, config.mcm_len)
    fused = model.fuse(video, model.encode_text(*question))
    return model.choose(fused, options.ids.shape[1])


def choose_each_alone(
    model: VideoLanguageModel,
    video: VideoFeatures,
    options: multiple_choice.Caption,
    _: ObjectivesConfig,
) -> Float[Array, "b c"]:
    """Score every option by a text of its own (ours)."""
    count = options.ids.shape[1]
    text = model.encode_text(*multiple_choice.fold(options))
    scores = model.choose(model.fuse(repeat_rows(video, count), text), 1)
    return rearrange(scores, "(b c) 1 -> b c", c=count)


CHOICES: Registry[Callable[..., Array]] = Registry(
    "objectives.mcm_kind", {"concat": choose_from_list, "score": choose_each_alone}
)


def repeat_rows(features: PyTree, count: int) -> PyTree:
    """Repeat every row `count` times, copies of a row next to each other."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), features)


def answer_log_probs(
    model: VideoLanguageModel,
    answers: multiple_choice.Caption,
    text: TextFeatures,
    fused: Float[Array, "b q d"],
) -> Float[Array, " b"]:
    """Compute the log-probability of each whole answer [CLS] tokens [SEP] to a fused question."""
    # Teacher forcing: one pass scores all positions, each given the right tokens before it.
    logits = model.decode_answer(answers.ids[:, :-1], text, fused)
    mask = answers.mask[:, 1:]
    log_p = -losses.cross_entropy(logits, answers.ids[:, 1:], mask)
    return jnp.where(mask, log_p, 0.0).sum(axis=1)


def rank_answers(
    model: VideoLanguageModel,
    video: VideoFeatures,
    text: TextFeatures,
    answers: multiple_choice.Caption,
    top_k: int,
) -> Float[Array, "b c"]:
    """Compute the log-probability of each of the answers [c a] to every question (Singularity).

    Only answers of the `top_k` likeliest first tokens are scored whole, since each costs a pass of
    the decoder; the others get NEVER.
    """
    fused = model.fuse(video, text)
    b, c = fused.shape[0], answers.ids.shape[0]
    k = min(top_k, c)
    start = jnp.broadcast_to(answers.ids[:1, :1], (b, 1))
    # All answers start with [CLS], so one position ranks the first tokens of all.
    first = model.decode_answer(start, text, fused)[:, 0]
    _, chosen = jax.lax.top_k(first[:, answers.ids[:, 1]], k)
    picked = multiple_choice.fold(
        multiple_choice.Caption(answers.ids[chosen], answers.mask[chosen])
    )
    log_p = answer_log_probs(model, picked, repeat_rows(text, k), repeat_rows(fused, k))
    scores = jnp.full((b, c), losses.NEVER)
    return scores.at[jnp.arange(b)[:, None], chosen].set(rearrange(log_p, "(b k) -> b k", b=b))
