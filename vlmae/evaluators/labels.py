"""Multi-label classification of clips with their text (MuLTI)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from data_pipelines.pipeline import EvalData
from vlmae.evaluators.encode import Trained, program
from vlmae.evaluators.metrics import average_precision, f1_scores
from vlmae.models.video_language import VideoLanguageModel


class Labels(NamedTuple):
    """What every clip was labeled, and how well."""

    predictions: list[dict]  # one for each clip
    metrics: dict[str, float]


def evaluate_labels(trained: Trained, data: EvalData) -> Labels:
    """Scores every label for every clip with its first caption.

    A label counts as given, for F1, if its probability is above one half. Clips that cannot be
    decoded are left out; labels that no clip has are left out of the mean average precision.

    Returns:
      `map` (mean average precision), `chance_map` (that of any constant score: the labels' mean
      frequency), `micro_f1`, `macro_f1`, in percent; `num_clips`, `num_labels`.
    """
    logits, correct, media_ids = score_labels(trained, data)
    precision = average_precision(logits, correct)
    counted = ~np.isnan(precision)
    result = {
        "map": 100 * float(precision[counted].mean()),
        "chance_map": 100 * float(correct.mean(axis=0)[counted].mean()),
        **f1_scores(logits > 0, correct),
        "num_clips": float(len(logits)),
        "num_labels": float(counted.sum()),
    }
    return Labels(describe(logits, correct, media_ids, data.classes.names), result)


def score_labels(
    trained: Trained, data: EvalData
) -> tuple[Float[np.ndarray, "n c"], Bool[np.ndarray, "n c"], Int[np.ndarray, " n"]]:
    """The logits, the right labels and the media ids of every usable clip."""

    def score(
        model: VideoLanguageModel,
        video: UInt8[Array, "b t h w 3"],
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"],
    ) -> Float[Array, "b c"]:
        return model.classify(model.fuse(model.encode_text(ids, mask), model.encode_video(video)))

    run, parts = program(trained, score), []
    for batch in data.batches():
        logits = run(batch.video, batch.text_ids, batch.text_mask)
        parts.append([x[batch.valid] for x in (logits, batch.targets, batch.media_ids)])
    logits, correct, media_ids = (np.concatenate(x) for x in zip(*parts, strict=True))
    return logits, correct, media_ids


def describe(
    logits: Float[np.ndarray, "n c"],
    correct: Bool[np.ndarray, "n c"],
    media_ids: Int[np.ndarray, " n"],
    names: tuple[str, ...],
) -> list[dict]:
    """For each clip: its labels, and the five of highest logit."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return [
        {
            "media_id": int(media_ids[row]),
            "labels": [names[i] for i in np.flatnonzero(correct[row])],
            "predicted": {names[i]: round(float(logits[row, i]), 4) for i in best[row]},
        }
        for row in range(len(logits))
    ]


def format_labels(metrics: dict[str, float]) -> str:
    """The metrics as a Markdown table."""
    names = ("map", "micro_f1", "macro_f1", "chance_map")
    head = "| mAP | micro F1 | macro F1 | chance mAP |\n|---|---|---|---|"
    return f"{head}\n| " + " | ".join(f"{metrics[name]:.1f}" for name in names) + " |"
