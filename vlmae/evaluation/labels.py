"""Multi-label classification of clips with their text (MuLTI)."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from data_pipelines.loading.evaluation import EvalData
from data_pipelines.schema.records import Batch
from vlmae.evaluation.encode import EvalInputs, map_clips
from vlmae.evaluation.intervals import label_intervals
from vlmae.evaluation.metrics import average_precision, f1_scores
from vlmae.evaluation.ranking import top_k
from vlmae.evaluation.result import Result
from vlmae.figures.answer_page import Item, Line, Shown
from vlmae.models.video_language import VideoLanguageModel
from vlmae.runs.inference import EvalContext
from vlmae.runs.tables import markdown_table


class Labeled(NamedTuple):
    """Logits and targets of every clip that can be decoded."""

    logits: Float[np.ndarray, "n c"]
    correct: Bool[np.ndarray, "n c"]
    rows: Int[np.ndarray, " n"]  # row numbers of the clips in the data


def evaluate_labels(context: EvalContext, inputs: EvalInputs) -> Result:
    """Score every label for every clip with its first caption.

    F1 counts a label as predicted if its probability is above one half. Clips that cannot be
    decoded are left out; labels that no clip has are left out of the mean average precision.

    Returns:
      Metrics `map` (mean average precision), `chance_map` (that of any constant score: the labels'
      mean frequency), `micro_f1`, `macro_f1`, in percent; `num_clips`, `num_labels`.
    """
    logits, correct, rows = labeled = score_labels(context, inputs.data)
    has_clip = correct.any(axis=0)  # no ranking can be right about a label without clips
    metrics = {
        "map": mean_average_precision(logits, correct),
        "chance_map": 100 * float(correct.mean(axis=0)[has_clip].mean()),
        **f1_scores(logits > 0, correct),
        "num_clips": float(len(rows)),
        "num_labels": float(has_clip.sum()),
    }
    groups = inputs.data.media_ids[rows]
    intervals = label_intervals(logits, logits > 0, correct, groups, context.on_progress)
    predictions, items = describe(labeled, inputs.data)
    return Result(metrics, intervals, predictions, items)


def mean_average_precision(
    scores: Float[np.ndarray, "n c"], correct: Bool[np.ndarray, "n c"]
) -> float:
    """Average the precisions of the labels that any clip has, in percent."""
    return 100 * float(np.nanmean(average_precision(scores, correct)))


def score_labels(context: EvalContext, data: EvalData) -> Labeled:
    """Classify every clip that can be decoded."""
    (logits, correct), rows = map_clips(context, data, _classify)
    return Labeled(logits, correct, rows)


def _classify(model: VideoLanguageModel, batch: Batch) -> tuple[tuple[Array, Array], Array]:
    text = model.encode_text(batch.text_ids, batch.text_mask)
    logits = model.classify(model.fuse(model.encode_video(batch.video), text))
    return (logits, batch.targets), batch.valid


def describe(labeled: Labeled, data: EvalData) -> tuple[list[dict], list[Item]]:
    """List the labels of each clip and the five of highest logit, as records and to be drawn."""
    names, predictions, items = data.classes.names, [], []
    best = top_k(labeled.logits, 5)
    for row, (clip, top) in enumerate(zip(labeled.rows, best, strict=True)):
        target = [names[i] for i in np.flatnonzero(labeled.correct[row])]
        predicted = {names[i]: round(float(labeled.logits[row, i]), 4) for i in top}
        predictions.append({"clip": data.names[clip], "labels": target, "predicted": predicted})
        lines = [Line(f"truth: {', '.join(target) or 'no label'}")]
        lines += [
            Line(f"{0.5 * (1 + math.tanh(logit / 2)):.2f}  {name}", name in target)
            for name, logit in predicted.items()
        ]
        items.append(Item(data.names[clip], [Shown(int(clip), "", None)], lines))
    return predictions, items


def format_labels(metrics: dict[str, float]) -> str:
    """Format the metrics as a Markdown table."""
    names = ("map", "micro_f1", "macro_f1", "chance_map")
    head = ["mAP", "micro F1", "macro F1", "chance mAP"]
    return markdown_table([head, [f"{metrics[name]:.1f}" for name in names]])
