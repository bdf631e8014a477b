"""Multi-label classification of clips with their text (MuLTI)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.evaluation import EvalData
from data_pipelines.records import Batch
from vlmae.analysis.page import Item, Shown
from vlmae.config import EvaluationConfig
from vlmae.evaluators.encode import Trained, map_clips
from vlmae.evaluators.metrics import average_precision, f1_scores
from vlmae.evaluators.result import Result
from vlmae.models.video_language import VideoLanguageModel


class Labeled(NamedTuple):
    """Every usable clip."""

    logits: Float[np.ndarray, "n c"]
    correct: Bool[np.ndarray, "n c"]
    rows: Int[np.ndarray, " n"]  # of the clips in the data


def evaluate_labels(trained: Trained, data: EvalData, config: EvaluationConfig) -> Result:
    """Scores every label for every clip with its first caption.

    A label counts as given, for F1, if its probability is above one half. Clips that cannot be
    decoded are left out; labels that no clip has are left out of the mean average precision.

    Returns:
      Metrics `map` (mean average precision), `chance_map` (that of any constant score: the labels'
      mean frequency), `micro_f1`, `macro_f1`, in percent; `num_clips`, `num_labels`.
    """
    logits, correct, rows = labeled = score_labels(trained, data)
    counted = correct.any(axis=0)
    metrics = {
        "map": mean_average_precision(logits, correct),
        "chance_map": 100 * float(correct.mean(axis=0)[counted].mean()),
        **f1_scores(logits > 0, correct),
        "num_clips": float(len(rows)),
        "num_labels": float(counted.sum()),
    }
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(rows), size=len(rows)) for _ in range(config.resamples))
    values = [mean_average_precision(logits[draw], correct[draw]) for draw in drawn]
    intervals = {"map": tuple(map(float, np.nanpercentile(values, [2.5, 97.5])))}
    predictions, items = describe(labeled, data)
    return Result(metrics, intervals, predictions, items)


def mean_average_precision(
    scores: Float[np.ndarray, "n c"], correct: Bool[np.ndarray, "n c"]
) -> float:
    """In percent, over the labels that any clip has."""
    return 100 * float(np.nanmean(average_precision(scores, correct)))


def score_labels(trained: Trained, data: EvalData) -> Labeled:
    """The logits and the right labels of every usable clip."""

    def score(model: VideoLanguageModel, batch: Batch) -> tuple[Array, Array]:
        text = model.encode_text(batch.text_ids, batch.text_mask)
        return model.classify(model.fuse(text, model.encode_video(batch.video))), batch.targets

    (logits, correct), rows = map_clips(trained, data, score)
    return Labeled(logits, correct, rows)


def describe(labeled: Labeled, data: EvalData) -> tuple[list[dict], list[Item]]:
    """For each clip its labels and the five of highest logit, in words and to be drawn."""
    names, predictions, items = data.classes.names, [], []
    best = np.argsort(-labeled.logits, axis=1, kind="stable")[:, :5]
    for row, (place, top) in enumerate(zip(labeled.rows, best, strict=True)):
        right = [names[i] for i in np.flatnonzero(labeled.correct[row])]
        given = {names[i]: round(float(labeled.logits[row, i]), 4) for i in top}
        predictions.append({"clip": data.names[place], "labels": right, "predicted": given})
        title = f"{', '.join(right) or 'no label'}; predicted: {', '.join(given)}"
        items.append(Item(title, [Shown(int(place), "", None)]))
    return predictions, items


def format_labels(metrics: dict[str, float]) -> str:
    """The metrics as a Markdown table."""
    names = ("map", "micro_f1", "macro_f1", "chance_map")
    head = "| mAP | micro F1 | macro F1 | chance mAP |\n|---|---|---|---|"
    return f"{head}\n| " + " | ".join(f"{metrics[name]:.1f}" for name in names) + " |"
