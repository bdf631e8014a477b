"""Open-ended question answering by the classifier over answers (MuLTI)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.classes import Classes
from data_pipelines.pipeline import EvalData
from data_pipelines.records import Questions
from vlmae.evaluators.encode import (
    Encoded,
    Trained,
    clip_rows,
    map_rows,
    program,
    select_texts,
    take_rows,
)
from vlmae.evaluators.metrics import accuracy_by_kind
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel


class Answers(NamedTuple):
    """What was answered to every question, and how well."""

    predictions: list[dict]  # one for each question
    metrics: dict[str, float]


def evaluate_answers(trained: Trained, data: EvalData, clips: Encoded) -> Answers:
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
    scores = score_answers(trained, questions, clips)
    names = np.array(data.classes.names)
    metrics = answer_metrics(names[scores.argmax(axis=1)], questions, data.classes)
    metrics["skipped_questions"] = float((~usable).sum())
    return Answers(describe(scores, questions, data.classes), metrics)


def score_answers(
    trained: Trained, questions: Questions, clips: Encoded
) -> Float[np.ndarray, "q c"]:
    """The logits of every class for every question."""

    def score(
        model: VideoLanguageModel,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"],
        video: VideoFeatures,
    ) -> Float[Array, "b c"]:
        return model.classify(model.fuse(model.encode_text(ids, mask), video))

    run = program(trained, score)

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
    scores: Float[np.ndarray, "q c"], questions: Questions, classes: Classes
) -> list[dict]:
    """For each question: the text, its kind, the right answer, and the five best with logits."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    rows = zip(questions.texts.captions, questions.kinds, questions.answers, strict=True)
    return [
        {
            "question": question,
            "kind": kind,
            "answer": answer,
            "predicted": {classes.names[i]: round(float(scores[row, i]), 4) for i in best[row]},
            "media_id": int(questions.texts.media_ids[row]),
        }
        for row, (question, kind, answer) in enumerate(rows)
    ]


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
