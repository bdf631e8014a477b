"""Retrieval, text to video and back: VTC ranks, VTM may score the top k again."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from data_pipelines.evaluation import EvalData
from data_pipelines.records import Texts
from vlmae.analysis.page import Item, Shown
from vlmae.config import EvaluationConfig
from vlmae.evaluators import metrics
from vlmae.evaluators.encode import (
    Encoded,
    Trained,
    encode_texts,
    map_rows,
    program,
    select_texts,
    take_rows,
)
from vlmae.evaluators.result import Result
from vlmae.scoring import match_scores

SHOWN = 5  # clips of each prediction
DUAL_TEMPERATURE = 0.01  # of the dual softmax (ours)


class Ranking(NamedTuple):
    """Scores of every query (rows) with every candidate (columns), and which are correct."""

    scores: Float[np.ndarray, "q n"]
    correct: Bool[np.ndarray, "q n"]
    media_ids: Int[np.ndarray, " q"]  # of the queries


def evaluate_retrieval(
    trained: Trained, data: EvalData, clips: Encoded, config: EvaluationConfig
) -> Result:
    """Ranks every clip for every caption and every caption for every clip.

    Clips that cannot be decoded are left out with their captions, and counted.

    Returns:
      Metrics named `t2v_r1`, ..., `v2t_mean_rank`, with `chance_*` beside the recalls,
      `num_clips` and `bad_clips`; with `dual_softmax` also `dual_softmax_t2v_r1`, .... A prediction
      and a picture for each caption: the five best clips.
    """
    captions = select_texts(data.texts, clips.media_ids)
    rankings = rank(trained, captions, clips, config)
    result, intervals = {}, {}
    for direction, ranking in rankings.items():
        values = metrics.retrieval_metrics(ranking.scores, ranking.correct)
        result |= {f"{direction}_{name}": value for name, value in values.items()}
        intervals |= recall_intervals(direction, ranking, config.resamples)
        if not direction.startswith("dual"):
            for k in metrics.RECALL_AT:
                chance = metrics.chance_recall(ranking.correct, k)
                result[f"{direction}_chance_r{k}"] = chance
    usable = len(clips.media_ids)
    result |= {"num_clips": float(usable), "bad_clips": float(data.num_clips - usable)}
    predictions, items = describe(rankings["t2v"], captions.captions, clips, data.names)
    return Result(result, intervals, predictions, items)


def rank(
    trained: Trained, captions: Texts, clips: Encoded, config: EvaluationConfig
) -> dict[str, Ranking]:
    """The rankings of both directions, and again with dual softmax if it is asked for.

    The similarity of a pair is the mean over frames of the inner products (VTC). With
    `rerank_top_k`, the k best candidates of each query are ordered by the matching head instead
    (SMAUG, downstream), for which `clips` must hold features. Neither batch size nor device count
    changes the result.
    """
    top_k = config.rerank_top_k
    texts = encode_texts(trained, captions, keep_features=top_k > 0)
    vtc = texts.embeddings @ clips.embeddings.T
    scores = {"t2v": vtc, "v2t": vtc.T}
    if config.dual_softmax:
        for direction, s in tuple(scores.items()):
            scores[f"dual_softmax_{direction}"] = metrics.dual_softmax(s, DUAL_TEMPERATURE)
    if top_k:
        pairs = top_pairs(vtc, top_k)
        matching = score_pairs(trained, texts, clips, pairs, config.frame_ensemble)
        scores["t2v"] = metrics.rerank(vtc, matching, top_k)
        scores["v2t"] = metrics.rerank(vtc.T, matching.T, top_k)
    correct = captions.media_ids[:, None] == clips.media_ids[None, :]
    of = {"t2v": (correct, captions.media_ids), "v2t": (correct.T, clips.media_ids)}
    return {name: Ranking(s, *of[name[-3:]]) for name, s in scores.items()}


def recall_intervals(
    direction: str, ranking: Ranking, resamples: int
) -> dict[str, tuple[float, float]]:
    """The confidence intervals of the recalls."""
    ranks = metrics.best_ranks(ranking.scores, ranking.correct)
    return {
        f"{direction}_r{k}": metrics.bootstrap_interval(
            100.0 * (ranks <= k), ranking.media_ids, resamples
        )
        for k in metrics.RECALL_AT
    }


def describe(
    ranking: Ranking, captions: Sequence[str], clips: Encoded, names: Sequence[str]
) -> tuple[list[dict], list[Item]]:
    """For each caption the rank of its clip and the five best, in words and to be drawn."""
    ranks = metrics.best_ranks(ranking.scores, ranking.correct)
    best = np.argsort(-ranking.scores, axis=1, kind="stable")[:, :SHOWN]
    predictions, items = [], []
    for row, caption in enumerate(captions):
        scores = [round(float(ranking.scores[row, i]), 4) for i in best[row]]
        predictions.append(
            {
                "caption": caption,
                "rank": int(ranks[row]),
                "clips": {names[clips.rows[i]]: s for i, s in zip(best[row], scores, strict=True)},
            }
        )
        shown = [
            Shown(int(clips.rows[i]), f"{s:.3f}", bool(ranking.correct[row, i]))
            for i, s in zip(best[row], scores, strict=True)
        ]
        items.append(Item(f"{caption} (rank {ranks[row]})", shown))
    return predictions, items


def top_pairs(scores: Float[np.ndarray, "q n"], top_k: int) -> Int[np.ndarray, "p 2"]:
    """The (text, clip) pairs among the k best of either direction, each once."""

    def top(s: np.ndarray) -> np.ndarray:
        chosen = np.zeros(s.shape, bool)
        best = np.argsort(-s, axis=1, kind="stable")[:, :top_k]
        np.put_along_axis(chosen, best, True, axis=1)
        return chosen

    return np.argwhere(top(scores) | top(scores.T).T)


def score_pairs(
    trained: Trained,
    texts: Encoded,
    clips: Encoded,
    pairs: Int[np.ndarray, "p 2"],
    ensemble: str = "concat",
) -> Float[np.ndarray, "q n"]:
    """Matching scores of the given pairs; NaN for every other pair."""
    run = program(trained, functools.partial(match_scores, ensemble=ensemble))

    def of_pairs(pairs: Int[np.ndarray, "b 2"]) -> Float[np.ndarray, " b"]:
        text_rows, clip_rows = pairs.T
        return run(take_rows(texts.features, text_rows), take_rows(clips.features, clip_rows))

    scores = np.full((len(texts.media_ids), len(clips.media_ids)), np.nan)
    scores[tuple(pairs.T)] = map_rows(of_pairs, (pairs,), trained.batch_size)
    return scores


def format_retrieval(result: dict[str, float]) -> str:
    """The metrics as a Markdown table, with chance beside them."""
    names = {"t2v": "text to video", "v2t": "video to text"}
    names |= {f"dual_softmax_{key}": f"{name}, dual softmax" for key, name in names.items()}
    header = "| | R@1 | R@5 | R@10 | median rank | mean rank |\n|---|---|---|---|---|---|"
    lines = [header]
    for direction, title in names.items():
        if f"{direction}_r1" not in result:
            continue
        recalls = [f"{result[f'{direction}_r{k}']:.1f}" for k in metrics.RECALL_AT]
        ranks = [f"{result[f'{direction}_{name}_rank']:.1f}" for name in ("median", "mean")]
        lines.append(f"| {title} | " + " | ".join(recalls + ranks) + " |")
    chance = [f"{result[f't2v_chance_r{k}']:.1f}" for k in metrics.RECALL_AT]
    lines.append(
        f"| chance, text to video ({result['num_clips']:.0f} clips) | "
        + " | ".join(chance)
        + " | | |"
    )
    return "\n".join(lines)
