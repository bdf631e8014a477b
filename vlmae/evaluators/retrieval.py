"""Zero-shot retrieval, text to video and back: VTC ranks, VTM may score the top k again."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from data_pipelines.pipeline import EvalData
from data_pipelines.records import Batch, Texts
from vlmae.evaluators import metrics
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.sharding import put_batch, replicated


class Retrieval(NamedTuple):
    """Scores of every text (rows) with every clip (columns), and the metrics of both directions."""

    scores: Float[np.ndarray, "q n"]
    metrics: dict[str, float]


class Encoded(NamedTuple):
    """Host copies of everything retrieval compares."""

    embeddings: Float[np.ndarray, "n e"]
    features: PyTree  # encoder features, row by row; None unless they are scored again


def evaluate_retrieval(
    model: VideoLanguageModel,
    params: PyTree,
    data: EvalData,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    rerank_top_k: int = 0,
) -> Retrieval:
    """Ranks every clip for every caption and every caption for every clip.

    The similarity of a pair is the mean over frames of the inner products (VTC). With
    `rerank_top_k`, the k best candidates of each query are ordered by the matching head instead
    (SMAUG, downstream). Padding rows are dropped before anything is compared, so neither batch
    size nor device count changes the result. Clips that cannot be decoded are left out with their
    captions, and counted.

    Returns:
      Scores of the captions and clips that took part; metrics named `t2v_r1`, ...,
      `v2t_mean_rank`, with `chance_*` beside the recalls, `num_clips` and `bad_clips`.
    """
    clips, clip_ids = encode_clips(model, params, data, mesh, keep_features=rerank_top_k > 0)
    captions = select_texts(data.texts, clip_ids)
    texts = encode_texts(model, params, captions, mesh, batch_size, keep_features=rerank_top_k > 0)
    scores = texts.embeddings @ clips.embeddings.T
    t2v, v2t = scores, scores.T
    if rerank_top_k:
        pairs = top_pairs(scores, rerank_top_k)
        matching = score_pairs(model, params, mesh, texts, clips, pairs, batch_size)
        t2v = metrics.rerank(scores, matching, rerank_top_k)
        v2t = metrics.rerank(scores.T, matching.T, rerank_top_k)
    correct = captions.media_ids[:, None] == clip_ids[None, :]
    result = {}
    for direction, s, c in (("t2v", t2v, correct), ("v2t", v2t, correct.T)):
        values = metrics.retrieval_metrics(s, c)
        values |= {f"chance_r{k}": metrics.chance_recall(c, k) for k in metrics.RECALL_AT}
        result |= {f"{direction}_{name}": value for name, value in values.items()}
    counts = {"num_clips": len(clip_ids), "bad_clips": data.num_clips - len(clip_ids)}
    return Retrieval(t2v, result | {name: float(count) for name, count in counts.items()})


def select_texts(texts: Texts, clip_ids: Int[np.ndarray, " n"]) -> Texts:
    """The captions that have a clip.

    Raises:
      ValueError: none has.
    """
    rows = np.flatnonzero(np.isin(texts.media_ids, clip_ids))
    if not len(rows):
        raise ValueError(f"none of the {len(texts.captions)} captions has a usable clip")
    captions = tuple(texts.captions[row] for row in rows)
    return Texts(texts.text_ids[rows], texts.text_mask[rows], texts.media_ids[rows], captions)


def encode_clips(
    model: VideoLanguageModel,
    params: PyTree,
    data: EvalData,
    mesh: jax.sharding.Mesh,
    keep_features: bool,
) -> tuple[Encoded, Int[np.ndarray, " n"]]:
    """Embeds every clip once, unmasked; returns the media ids of the clips that are valid."""

    def encode(params: PyTree, batch: Batch) -> tuple[Array, PyTree]:
        def run(model: VideoLanguageModel) -> tuple[Array, PyTree]:
            video = model.encode_video(batch.video)
            return model.embed_video(video).mean(axis=1), video if keep_features else None

        return model.apply({"params": params}, method=run)

    run = jax.jit(encode, out_shardings=replicated(mesh))
    rows, ids = [], []
    for batch in data.batches():
        encoded = jax.device_get(run(params, put_batch(batch, mesh)))
        rows.append(jax.tree.map(lambda x, keep=batch.valid: x[keep], encoded))
        ids.append(batch.media_ids[batch.valid])
    return Encoded(*_concatenate(rows)), np.concatenate(ids)


def encode_texts(
    model: VideoLanguageModel,
    params: PyTree,
    texts: Texts,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    keep_features: bool,
) -> Encoded:
    """Embeds every caption."""

    def encode(params: PyTree, ids: Array, mask: Array) -> tuple[Array, PyTree]:
        def run(model: VideoLanguageModel) -> tuple[Array, PyTree]:
            text = model.encode_text(ids, mask)
            return model.embed_text(text), text if keep_features else None

        return model.apply({"params": params}, method=run)

    run = jax.jit(encode, out_shardings=replicated(mesh))
    rows = []
    for chunk in chunks(len(texts.text_ids), batch_size):
        inputs = put_batch((texts.text_ids[chunk.rows], texts.text_mask[chunk.rows]), mesh)
        encoded = jax.device_get(run(params, *inputs))
        rows.append(jax.tree.map(lambda x, size=chunk.size: x[:size], encoded))
    return Encoded(*_concatenate(rows))


def top_pairs(scores: Float[np.ndarray, "q n"], top_k: int) -> Int[np.ndarray, "p 2"]:
    """The (text, clip) pairs among the k best of either direction, each once."""

    def top(s: np.ndarray) -> np.ndarray:
        chosen = np.zeros(s.shape, bool)
        best = np.argsort(-s, axis=1, kind="stable")[:, :top_k]
        np.put_along_axis(chosen, best, True, axis=1)
        return chosen

    return np.argwhere(top(scores) | top(scores.T).T)


def score_pairs(
    model: VideoLanguageModel,
    params: PyTree,
    mesh: jax.sharding.Mesh,
    texts: Encoded,
    clips: Encoded,
    pairs: Int[np.ndarray, "p 2"],
    batch_size: int,
) -> Float[np.ndarray, "q n"]:
    """Matching logits of the given pairs (match minus no match); NaN for every other pair."""

    def match(params: PyTree, text: TextFeatures, video: PyTree) -> Array:
        def run(model: VideoLanguageModel) -> Array:
            return model.match(model.fuse(text, video))

        logits = model.apply({"params": params}, method=run)
        return logits[:, 1] - logits[:, 0]

    run = jax.jit(match, out_shardings=replicated(mesh))
    scores = np.full((len(texts.embeddings), len(clips.embeddings)), np.nan)
    for chunk in chunks(len(pairs), batch_size):
        text_rows, clip_rows = pairs[chunk.rows].T
        text = jax.tree.map(lambda x, rows=text_rows: x[rows], texts.features)
        clip = jax.tree.map(lambda x, rows=clip_rows: x[rows], clips.features)
        values = jax.device_get(run(params, put_batch(text, mesh), put_batch(clip, mesh)))
        scores[text_rows[: chunk.size], clip_rows[: chunk.size]] = values[: chunk.size]
    return scores


def format_table(result: dict[str, float]) -> str:
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


class Chunk(NamedTuple):
    """Rows that go through a program together."""

    rows: Int[np.ndarray, " b"]  # row numbers; the last one is repeated to fill the chunk
    size: int  # how many of them are real


def chunks(count: int, size: int) -> list[Chunk]:
    """All of `count` rows in chunks of one size, so that one program serves them all."""
    starts = range(0, count, size)
    return [
        Chunk(np.minimum(np.arange(s, s + size), count - 1), min(size, count - s)) for s in starts
    ]


def _concatenate(rows: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *xs: np.concatenate(xs), *rows)
