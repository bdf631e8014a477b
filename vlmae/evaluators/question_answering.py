"""Open-ended question answering: by a classifier over answers, or a decoder that ranks them."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.classes import Classes
from data_pipelines.evaluation import EvalData
from data_pipelines.records import Questions
from vlmae.analysis.page import Item, Shown
from vlmae.choices import Caption
from vlmae.config import EvaluationConfig, ObjectivesConfig
from vlmae.evaluators.encode import (
    Encoded,
    Trained,
    clip_rows,
    map_rows,
    program,
    select_texts,
    take_rows,
)
from vlmae.evaluators.metrics import accuracy_by_kind, bootstrap_interval
from vlmae.evaluators.result import Result
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.scoring import rank_answers

SHOWN = 5  # answers of each prediction


def evaluate_answers(
    trained: Trained,
    data: EvalData,
    clips: Encoded,
    config: EvaluationConfig,
    objectives: ObjectivesConfig,
) -> Result:
    """Asks every question about its clip; `clips` must hold features.

    A question is right if its answer has the highest score of all classes; one whose answer is no
    class cannot be, and counts as wrong. Questions about clips that cannot be decoded are left out.

    Returns:
      Metrics in percent: `accuracy` and `accuracy_KIND`; `frequent_accuracy` and
      `frequent_accuracy_KIND`, reached by always giving the most frequent training answer to
      questions of the kind; `answerable`, the share of questions whose answer is a class. Also
      `num_questions` and `skipped_questions`.

    Raises:
      ValueError: no question has a usable clip.
    """
    usable = np.isin(data.questions.texts.media_ids, clips.media_ids)
    questions = Questions(
        select_texts(data.questions.texts, clips.media_ids),
        *(tuple(np.array(x)[usable].tolist()) for x in data.questions[1:]),
    )
    if objectives.answer_kind == "decoder":
        answers = Caption(*data.answers())
        method = functools.partial(decode_scores, answers=answers, top_k=config.answers_top_k)
    else:
        method = classify_scores
    scores = score_questions(trained, method, questions, clips)
    predicted = np.array(data.classes.names)[scores.argmax(axis=1)]
    metrics = answer_metrics(predicted, questions, data.classes)
    metrics["skipped_questions"] = float((~usable).sum())
    right = 100.0 * (predicted == np.array(questions.answers))
    interval = bootstrap_interval(right, questions.texts.media_ids, config.resamples)
    return Result(metrics, {"accuracy": interval}, *describe(scores, questions, clips, data))


def classify_scores(
    model: VideoLanguageModel,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    video: VideoFeatures,
) -> Float[Array, "b c"]:
    """The logits of the classifier over answers."""
    return model.classify(model.fuse(model.encode_text(ids, mask), video))


def decode_scores(
    model: VideoLanguageModel,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    video: VideoFeatures,
    *,
    answers: Caption,
    top_k: int,
) -> Float[Array, "b c"]:
    """The log-probabilities that the decoder gives to the answers."""
    answers = Caption(*map(jnp.asarray, answers))
    return rank_answers(model, answers, model.encode_text(ids, mask), video, top_k)


def score_questions(
    trained: Trained, method: Callable, questions: Questions, clips: Encoded
) -> Float[np.ndarray, "q c"]:
    """The score of every class for every question."""
    run = program(trained, method)

    def of_rows(ids: np.ndarray, mask: np.ndarray, clip: np.ndarray) -> np.ndarray:
        return run(ids, mask, take_rows(clips.features, clip))

    texts = questions.texts
    rows = clip_rows(clips, texts.media_ids)
    return map_rows(of_rows, (texts.text_ids, texts.text_mask, rows), trained.batch_size)


def answer_metrics(
    predicted: np.ndarray, questions: Questions, classes: Classes
) -> dict[str, float]:
    """The metrics of `evaluate_answers` from what was answered to each question."""
    answers, kinds = np.array(questions.answers), questions.kinds
    frequent = np.array([classes.most_frequent(kind) for kind in kinds])
    result = {
        "num_questions": float(len(answers)),
        "answerable": 100 * float(np.isin(answers, classes.names).mean()),
    }
    for name, given in (("accuracy", predicted), ("frequent_accuracy", frequent)):
        right = given == answers
        result[name] = 100 * float(right.mean())
        by_kind = accuracy_by_kind(right, kinds)
        result |= {f"{name}_{kind}": value for kind, value in by_kind.items() if kind}
    return result


def describe(
    scores: Float[np.ndarray, "q c"], questions: Questions, clips: Encoded, data: EvalData
) -> tuple[list[dict], list[Item]]:
    """For each question its kind, the right answer and the five best, in words and to be drawn."""
    names = data.classes.names
    best = np.argsort(-scores, axis=1, kind="stable")[:, :SHOWN]
    rows = clips.rows[clip_rows(clips, questions.texts.media_ids)]
    predictions, items = [], []
    for place, (question, answer) in enumerate(
        zip(questions.texts.captions, questions.answers, strict=True)
    ):
        given = {names[i]: round(float(scores[place, i]), 4) for i in best[place]}
        predictions.append(
            {
                "question": question,
                "kind": questions.kinds[place],
                "answer": answer,
                "predicted": given,
                "clip": data.names[rows[place]],
            }
        )
        said = next(iter(given))
        shown = Shown(int(rows[place]), said, said == answer)
        items.append(Item(f"{question} {answer}", [shown]))
    return predictions, items


def format_answers(metrics: dict[str, float]) -> str:
    """Accuracy and the blind baseline as a Markdown table, a column for each kind."""
    kinds = [name.removeprefix("accuracy_") for name in metrics if name.startswith("accuracy_")]
    lines = [
        "| question answering, top-1 in percent | all | " + " | ".join(kinds) + " |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for name, title in (("accuracy", "answered"), ("frequent_accuracy", "most frequent answer")):
        cells = [metrics[name], *(metrics[f"{name}_{kind}"] for kind in kinds)]
        lines.append(f"| {title} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines)
