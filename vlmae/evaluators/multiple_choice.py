"""Multiple choice: the true caption of a held-out clip among wrong ones (as MuLTI's MCM)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, PyTree

from data_pipelines.pipeline import EvalData
from data_pipelines.records import Texts
from vlmae.choices import Caption
from vlmae.config import ObjectivesConfig
from vlmae.evaluators.retrieval import chunks, encode_clips, select_texts
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.objectives import choice_logits, each_option
from vlmae.sharding import put_batch, replicated


class Questions(NamedTuple):
    """One question for each caption that has enough wrong ones."""

    options: Int[np.ndarray, "q c"]  # rows of the captions
    answer: Int[np.ndarray, " q"]  # the place of the true one
    skipped: int  # captions for which there are too few wrong ones


def make_questions(texts: Texts, num_options: int, seed: int = 0) -> Questions:
    """Each caption among wrong ones of other clips, drawn once for all.

    Wrong ones have another media id and other words, and no two of a question are equal. The same
    texts and seed always give the same questions.
    """
    rng = np.random.default_rng(seed)
    words = np.unique(texts.text_ids, axis=0, return_inverse=True)[1].ravel()
    options, answers = [], []
    for row, (media, own) in enumerate(zip(texts.media_ids, words, strict=True)):
        wrong = rng.permutation(np.flatnonzero((texts.media_ids != media) & (words != own)))
        _, first = np.unique(words[wrong], return_index=True)
        chosen = wrong[np.sort(first)][: num_options - 1]
        if len(chosen) == num_options - 1:
            answers.append(int(rng.integers(num_options)))
            options.append(np.insert(chosen, answers[-1], row))
    return Questions(
        np.array(options, np.int32).reshape(-1, num_options),
        np.array(answers, np.int32),
        len(texts.captions) - len(options),
    )


def evaluate_multiple_choice(
    model: VideoLanguageModel,
    params: PyTree,
    data: EvalData,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    num_options: int,
    objectives: ObjectivesConfig,
) -> dict[str, float]:
    """Accuracy in percent, by the matching head and by that of MCM, as far as they were trained.

    Clips that cannot be decoded are left out with their captions.

    Returns:
      `match_accuracy` and `mcm_accuracy`, with `chance_accuracy`, `num_questions` and
      `skipped_questions` (captions without enough wrong ones).

    Raises:
      ValueError: no caption has enough wrong ones.
    """
    clips, clip_ids = encode_clips(model, params, data, mesh, keep_features=True)
    texts = select_texts(data.texts, clip_ids)
    questions = make_questions(texts, num_options)
    if not len(questions.answer):
        raise ValueError(f"no caption has {num_options - 1} wrong ones for multiple choice")
    result = {
        "chance_accuracy": 100 / num_options,
        "num_questions": float(len(questions.answer)),
        "skipped_questions": float(questions.skipped),
    }
    truth = questions.options[np.arange(len(questions.answer)), questions.answer]
    clip_rows = (clip_ids == texts.media_ids[truth][:, None]).argmax(axis=1)
    for name, weight, head in (
        ("match", objectives.vtm, match_options),
        ("mcm", objectives.mcm, choice_logits),
    ):
        if weight:
            run = _compile(model, head, objectives, mesh)
            right = []
            for chunk in chunks(len(clip_rows), batch_size):
                rows = questions.options[chunk.rows]
                options = Caption(texts.text_ids[rows], texts.text_mask[rows])
                video = jax.tree.map(lambda x, r=clip_rows[chunk.rows]: x[r], clips.features)
                scores = run(params, put_batch(options, mesh), put_batch(video, mesh))
                best = jax.device_get(scores).argmax(axis=1)
                right.append((best == questions.answer[chunk.rows])[: chunk.size])
            result[f"{name}_accuracy"] = 100 * float(np.concatenate(right).mean())
    return result


def _compile(
    model: VideoLanguageModel, head: Callable, objectives: ObjectivesConfig, mesh: jax.sharding.Mesh
) -> Callable[[PyTree, Caption, VideoFeatures], Array]:
    """The scores [b c] of a head, jitted."""

    def scores(params: PyTree, options: Caption, video: VideoFeatures) -> Array:
        def run(model: VideoLanguageModel) -> Array:
            return head(model, options, video, objectives)

        return model.apply({"params": params}, method=run)

    return jax.jit(scores, out_shardings=replicated(mesh))


def match_options(
    model: VideoLanguageModel, options: Caption, video: VideoFeatures, config: ObjectivesConfig
) -> Float[Array, "b c"]:
    """How well each option matches the clip: the logit of a match minus that of none."""
    logits = model.match(each_option(model, options, video))
    return rearrange(logits[:, 1] - logits[:, 0], "(b c) -> b c", c=options.ids.shape[1])
