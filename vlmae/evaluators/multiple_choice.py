"""Multiple choice: the true caption of a held-out clip among wrong ones (as MuLTI's MCM)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from data_pipelines.pipeline import EvalData
from data_pipelines.records import Texts
from vlmae.choices import Caption
from vlmae.config import ObjectivesConfig
from vlmae.evaluators.encode import (
    Encoded,
    Trained,
    clip_rows,
    map_rows,
    program,
    select_texts,
    take_rows,
)
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.objectives import choice_logits, each_option


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
    trained: Trained,
    data: EvalData,
    clips: Encoded,
    *,
    num_options: int,
    objectives: ObjectivesConfig,
) -> dict[str, float]:
    """Accuracy in percent, by the matching head and by that of MCM, as far as they were trained.

    Clips that cannot be decoded are left out with their captions; `clips` must hold features.

    Returns:
      `match_accuracy` and `mcm_accuracy`, with `chance_accuracy`, `num_questions` and
      `skipped_questions` (captions without enough wrong ones).

    Raises:
      ValueError: no caption has enough wrong ones.
    """
    texts = select_texts(data.texts, clips.media_ids)
    questions = make_questions(texts, num_options)
    if not len(questions.answer):
        raise ValueError(f"no caption has {num_options - 1} wrong ones for multiple choice")
    result = {
        "chance_accuracy": 100 / num_options,
        "num_questions": float(len(questions.answer)),
        "skipped_questions": float(questions.skipped),
    }
    truth = questions.options[np.arange(len(questions.answer)), questions.answer]
    rows = clip_rows(clips, texts.media_ids[truth])
    for name, weight, head in (
        ("match", objectives.vtm, match_options),
        ("mcm", objectives.mcm, choice_logits),
    ):
        if weight:
            run = program(trained, functools.partial(head, config=objectives))

            def score(options: np.ndarray, clip: np.ndarray, run: Callable = run) -> np.ndarray:
                captions = Caption(texts.text_ids[options], texts.text_mask[options])
                return run(captions, take_rows(clips.features, clip))

            scores = map_rows(score, (questions.options, rows), trained.batch_size)
            right = scores.argmax(axis=1) == questions.answer
            result[f"{name}_accuracy"] = 100 * float(right.mean())
    return result


def match_options(
    model: VideoLanguageModel, options: Caption, video: VideoFeatures, config: ObjectivesConfig
) -> Float[Array, "b c"]:
    """How well each option matches the clip: the logit of a match minus that of none."""
    logits = model.match(each_option(model, options, video))
    return rearrange(logits[:, 1] - logits[:, 0], "(b c) -> b c", c=options.ids.shape[1])


def format_choices(metrics: dict[str, float]) -> str:
    """The accuracies as a Markdown table, a column for each head."""
    names = [name for name in metrics if name.endswith("accuracy")]
    head = " | ".join(name.removesuffix("_accuracy") for name in names)
    cells = " | ".join(f"{metrics[name]:.1f}" for name in names)
    count = f"multiple choice, percent of {metrics['num_questions']:.0f} questions"
    return f"| {count} | {head} |\n|---|{'---|' * len(names)}\n| accuracy | {cells} |"
