"""What objectives and evaluators score alike: matches, options of questions, answers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, PyTree

from vlmae import choices, losses
from vlmae.config import ObjectivesConfig
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel

ENSEMBLES: dict[str, Callable[..., Array]] = {
    "mean": jnp.mean,
    "max": jnp.max,
    "lse": jax.nn.logsumexp,
}


def match_scores(
    model: VideoLanguageModel, text: TextFeatures, video: VideoFeatures, ensemble: str = "concat"
) -> Float[Array, " b"]:
    """The logit of a match minus that of none, for text i with clip i.

    With an ensemble ("mean", "max", "lse") every frame is scored as a clip of its own, and the
    scores of a clip are put together (Singularity's evaluation); "concat" scores all at once.
    """
    if ensemble == "concat":
        logits = model.match(model.fuse(text, video))
        return logits[:, 1] - logits[:, 0]
    t = video.tokens.shape[1]
    scores = match_scores(model, repeat_rows(text, t), video.frames_apart)
    return ENSEMBLES[ensemble](rearrange(scores, "(b t) -> b t", t=t), axis=1)


def choice_logits(
    model: VideoLanguageModel,
    options: choices.Caption,
    video: VideoFeatures,
    config: ObjectivesConfig,
) -> Float[Array, "b c"]:
    """Which of its options describes each clip, by the head of MCM."""
    count = options.ids.shape[1]
    if config.mcm_kind == "score":
        scores = model.choose(each_option(model, options, video), 1)
        return rearrange(scores, "(b c) 1 -> b c", c=count)
    question = choices.compose(config.mcm_template_ids, options, config.mcm_len)
    return model.choose(model.fuse(model.encode_text(*question), video), count)


def each_option(
    model: VideoLanguageModel, options: choices.Caption, video: VideoFeatures
) -> Float[Array, "f q d"]:
    """Every option fused with its clip on its own, the options of a clip one after the other."""
    text = model.encode_text(*choices.fold(options))
    return model.fuse(text, repeat_rows(video, options.ids.shape[1]))


def repeat_rows(features: PyTree, count: int) -> PyTree:
    """Every row `count` times, one after the other."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), features)


def answer_log_probs(
    model: VideoLanguageModel,
    answers: choices.Caption,
    text: TextFeatures,
    fused: Float[Array, "b q d"],
) -> Float[Array, " b"]:
    """The log-probability of each whole answer [CLS] words [SEP], given its fused question."""
    logits = model.decode_answer(answers.ids[:, :-1], text, fused)
    log_p = -losses.cross_entropy(logits, answers.ids[:, 1:])
    return jnp.where(answers.mask[:, 1:], log_p, 0.0).sum(axis=1)


def rank_answers(
    model: VideoLanguageModel,
    answers: choices.Caption,
    text: TextFeatures,
    video: VideoFeatures,
    top_k: int,
) -> Float[Array, "b c"]:
    """The log-probability of each of the answers [c a], for every question (Singularity).

    Only those of the `top_k` likeliest first words are scored whole; the others get NEVER.
    """
    fused = model.fuse(text, video)
    b, c = fused.shape[0], answers.ids.shape[0]
    k = min(top_k, c)
    start = jnp.broadcast_to(answers.ids[:1, :1], (b, 1))
    first = model.decode_answer(start, text, fused)[:, 0]
    _, chosen = jax.lax.top_k(first[:, answers.ids[:, 1]], k)
    picked = choices.fold(choices.Caption(answers.ids[chosen], answers.mask[chosen]))
    log_p = answer_log_probs(model, picked, repeat_rows(text, k), repeat_rows(fused, k))
    scores = jnp.full((b, c), losses.NEVER)
    return scores.at[jnp.arange(b)[:, None], chosen].set(rearrange(log_p, "(b k) -> b k", b=b))
