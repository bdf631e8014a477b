"""Open-ended question answering by a classifier over answers, or by a decoder that ranks them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.loading.evaluation import EvalData
from data_pipelines.schema.classes import Classes
from data_pipelines.schema.records import Questions
from vlmae.config.experiment import EvaluationConfig, ObjectivesConfig
from vlmae.evaluation.clip_features import map_pairs
from vlmae.evaluation.encode import Encoded, EvalInputs, select_texts
from vlmae.evaluation.intervals import mean_interval
from vlmae.evaluation.metrics import accuracy_by_kind
from vlmae.evaluation.result import Result
from vlmae.figures.answer_page import Item, Line, Shown
from vlmae.models.scoring import rank_answers
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops.multiple_choice import Caption
from vlmae.runs.inference import EvalContext
from vlmae.runs.tables import markdown_table

SHOWN = 5  # answers of each prediction
DRAWN = 3  # of these, in a picture


def evaluate_answers(context: EvalContext, inputs: EvalInputs) -> Result:
    """Ask every question about its clip; the clips must hold features.

    The predicted answer is the class of highest score. A question whose answer is no class counts
    as wrong. Questions about clips that cannot be decoded are left out.

    Returns:
      Metrics in percent: `accuracy` and `accuracy_KIND`; `frequent_accuracy` and
      `frequent_accuracy_KIND`, reached by always giving the most frequent training answer to
      questions of the kind; `answerable`, the share of questions whose answer is a class. Of the
      classifier `nll`: the negative log of the softmax over classes at the answer, in nats, the
      mean over questions whose answer is a class; left out if there is none. Also `num_questions`
      and `skipped_questions`.

    Raises:
      UserError: no question has a usable clip.
    """
    data, clips, config, objectives, _ = inputs
    # A clip that cannot be decoded says nothing about the model; its questions are only counted.
    usable = np.isin(data.questions.texts.rows, clips.rows)
    questions = Questions(
        select_texts(data.questions.texts, usable),
        *(tuple(np.array(x)[usable].tolist()) for x in data.questions[1:]),
    )
    method = answering(data, objectives, config)
    # Of hundreds of thousands of questions, the scores of all classes would be gigabytes.
    numbers = {name: number for number, name in enumerate(data.classes.names)}
    truth = np.array([numbers.get(answer, -1) for answer in questions.answers], np.int32)
    best, scores, nll = score_questions(context, method, questions, truth, clips, top_k=SHOWN)
    predicted = np.array(data.classes.names)[best[:, 0]]
    metrics = answer_metrics(predicted, questions, data.classes)
    if objectives.answer_kind != "decoder" and (truth >= 0).any():
        metrics["nll"] = float(nll[truth >= 0].mean())
    metrics["skipped_questions"] = float((~usable).sum())
    right = predicted == np.array(questions.answers)
    interval = mean_interval(right, questions.texts.media_ids)
    return Result(metrics, {"accuracy": interval}, *describe(best, scores, questions, data))


def answering(
    data: EvalData, objectives: ObjectivesConfig, config: EvaluationConfig
) -> functools.partial:
    """Return the method that scores questions: the classifier, or the decoder with all answers."""
    if objectives.answer_kind != "decoder":
        return functools.partial(classify_scores)
    # As tuples, since they are constants of the program, which is found again by their values.
    answers = tuple(tuple(map(tuple, x.tolist())) for x in data.answers())
    return functools.partial(decode_scores, answers=answers, top_k=config.answers_top_k)


def classify_scores(
    model: VideoLanguageModel,
    video: VideoFeatures,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
) -> Float[Array, "b c"]:
    """Compute the logits of the classifier over answers."""
    return model.classify(model.fuse(video, model.encode_text(ids, mask)))


def decode_scores(
    model: VideoLanguageModel,
    video: VideoFeatures,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    answers: tuple[tuple[tuple[int, ...], ...], tuple[tuple[bool, ...], ...]],
    top_k: int,
) -> Float[Array, "b c"]:
    """Compute the log-probabilities that the decoder gives to the answers."""
    of_all = Caption(*map(jnp.asarray, answers))
    return rank_answers(model, video, model.encode_text(ids, mask), of_all, top_k)


def score_questions(
    context: EvalContext,
    method: functools.partial,
    questions: Questions,
    truth: Int[np.ndarray, " q"],
    clips: Encoded,
    top_k: int,
) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"], Float[np.ndarray, " q"]]:
    """Score every class for every question; `truth` is its class, or -1.

    Returns:
      The `top_k` classes of highest score of each question, the best first, their scores, and the
      negative log of the softmax at the true class (of no meaning where that is -1).
    """
    texts = questions.texts

    def text_of(rows: Int[np.ndarray, " b"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return texts.text_ids[rows], texts.text_mask[rows], truth[rows]

    static = {"scorer": method.func, "static": tuple(sorted(method.keywords.items()))}
    return map_pairs(context, best_classes, clips.features, texts.rows, text_of, k=top_k, **static)


def best_classes(
    model: VideoLanguageModel,
    video: VideoFeatures,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    truth: Int[Array, " b"],
    *,
    scorer: Callable[..., Array],
    static: tuple[tuple[str, Any], ...],
    k: int,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"], Float[Array, " b"]]:
    """Find the classes that a method scores highest; of equal ones the first come first."""
    scores = scorer(model, video, ids, mask, **dict(static))
    values, classes = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return classes, values, optax.softmax_cross_entropy_with_integer_labels(scores, truth)


def answer_metrics(
    predicted: np.ndarray, questions: Questions, classes: Classes
) -> dict[str, float]:
    """Compute the metrics of `evaluate_answers` from the predicted answers."""
    answers, kinds = np.array(questions.answers), questions.kinds
    of_kind = {kind: classes.most_frequent(kind) for kind in set(kinds)}
    frequent = np.array([of_kind[kind] for kind in kinds])
    result = {
        "num_questions": float(len(answers)),
        "answerable": 100 * float(np.isin(answers, classes.names).mean()),
    }
    for name, given in (("accuracy", predicted), ("frequent_accuracy", frequent)):
        correct = given == answers
        result[name] = 100 * float(correct.mean())
        by_kind = accuracy_by_kind(correct, kinds)
        result |= {f"{name}_{kind}": value for kind, value in by_kind.items() if kind}
    return result


def describe(
    best: Int[np.ndarray, "q k"],
    scores: Float[np.ndarray, "q k"],
    questions: Questions,
    data: EvalData,
) -> tuple[list[dict], list[Item]]:
    """List each question with its answer and the five best ones, as records and to be drawn."""
    names = data.classes.names
    rows = questions.texts.rows
    predictions, items = [], []
    for number, (question, answer) in enumerate(
        zip(questions.texts.captions, questions.answers, strict=True)
    ):
        ranked = zip(best[number], scores[number], strict=True)
        predicted = {names[i]: round(float(score), 4) for i, score in ranked}
        predictions.append(
            {
                "question": question,
                "kind": questions.kinds[number],
                "answer": answer,
                "predicted": predicted,
                "clip": data.names[rows[number]],
            }
        )
        lines = [Line(f"truth: {answer}")]
        lines += [
            Line(f"{'answered' if place == 0 else 'or'}: {name}  ({score:.2f})", name == answer)
            for place, (name, score) in enumerate([*predicted.items()][:DRAWN])
        ]
        items.append(Item(question, [Shown(int(rows[number]), "", None)], lines))
    return predictions, items


def format_answers(metrics: dict[str, float]) -> str:
    """Format accuracy and the blind baseline as a Markdown table, a column for each kind."""
    kinds = [name.removeprefix("accuracy_") for name in metrics if name.startswith("accuracy_")]
    rows = [["question answering, top-1 in percent", "all", *kinds]]
    for name, title in (("accuracy", "answered"), ("frequent_accuracy", "most frequent answer")):
        values = [metrics[name], *(metrics[f"{name}_{kind}"] for kind in kinds)]
        rows.append([title, *(f"{value:.1f}" for value in values)])
    return markdown_table(rows)
