"""Zero-shot retrieval, text to video and back: VTC ranks, VTM may score the top k again."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from data_pipelines.pipeline import EvalData
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
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel


class Retrieval(NamedTuple):
    """Scores of every text (rows) with every clip (columns), and the metrics of both directions."""

    scores: Float[np.ndarray, "q n"]
    metrics: dict[str, float]


def evaluate_retrieval(
    trained: Trained, data: EvalData, clips: Encoded, *, rerank_top_k: int = 0
) -> Retrieval:
    """Ranks every clip for every caption and every caption for every clip.

    The similarity of a pair is the mean over frames of the inner products (VTC). With
    `rerank_top_k`, the k best candidates of each query are ordered by the matching head instead
    (SMAUG, downstream), for which `clips` must hold features. Neither batch size nor device count
    changes the result. Clips that cannot be decoded are left out with their captions, and counted.

    Returns:
      Scores of the captions and clips that took part; metrics named `t2v_r1`, ...,
      `v2t_mean_rank`, with `chance_*` beside the recalls, `num_clips` and `bad_clips`.
    """
    captions = select_texts(data.texts, clips.media_ids)
    texts = encode_texts(trained, captions, keep_features=rerank_top_k > 0)
    scores = texts.embeddings @ clips.embeddings.T
    t2v, v2t = scores, scores.T
    if rerank_top_k:
        matching = score_pairs(trained, texts, clips, top_pairs(scores, rerank_top_k))
        t2v = metrics.rerank(scores, matching, rerank_top_k)
        v2t = metrics.rerank(scores.T, matching.T, rerank_top_k)
    correct = captions.media_ids[:, None] == clips.media_ids[None, :]
    result = {}
    for direction, s, c in (("t2v", t2v, correct), ("v2t", v2t, correct.T)):
        values = metrics.retrieval_metrics(s, c)
        values |= {f"chance_r{k}": metrics.chance_recall(c, k) for k in metrics.RECALL_AT}
        result |= {f"{direction}_{name}": value for name, value in values.items()}
    usable = len(clips.media_ids)
    counts = {"num_clips": usable, "bad_clips": data.num_clips - usable}
    return Retrieval(t2v, result | {name: float(count) for name, count in counts.items()})


def top_pairs(scores: Float[np.ndarray, "q n"], top_k: int) -> Int[np.ndarray, "p 2"]:
    """The (text, clip) pairs among the k best of either direction, each once."""

    def top(s: np.ndarray) -> np.ndarray:
        chosen = np.zeros(s.shape, bool)
        best = np.argsort(-s, axis=1, kind="stable")[:, :top_k]
        np.put_along_axis(chosen, best, True, axis=1)
        return chosen

    return np.argwhere(top(scores) | top(scores.T).T)


def score_pairs(
    trained: Trained, texts: Encoded, clips: Encoded, pairs: Int[np.ndarray, "p 2"]
) -> Float[np.ndarray, "q n"]:
    """Matching logits of the given pairs (match minus no match); NaN for every other pair."""

    def match(model: VideoLanguageModel, text: TextFeatures, video: VideoFeatures) -> Array:
        logits = model.match(model.fuse(text, video))
        return logits[:, 1] - logits[:, 0]

    run = program(trained, match)

    def of_pairs(pairs: Int[np.ndarray, "b 2"]) -> Float[np.ndarray, " b"]:
        text_rows, clip_rows = pairs.T
        return run(take_rows(texts.features, text_rows), take_rows(clips.features, clip_rows))

    scores = np.full((len(texts.media_ids), len(clips.media_ids)), np.nan)
    scores[tuple(pairs.T)] = map_rows(of_pairs, (pairs,), trained.batch_size)
    return scores


def format_retrieval(result: dict[str, float]) -> str:
    """The metrics as a Markdown table, with chance beside them."""
    header = "| | R@1 | R@5 | R@10 | median rank | mean rank |\n|---|---|---|---|---|---|"
    lines = [header]
    for direction, title in (("t2v", "text to video"), ("v2t", "video to text")):
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
