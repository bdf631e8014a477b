"""Retrieval, text to video and video to text: VTC ranks, VTM may rank the top k again."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, PyTree

from data_pipelines.schema.records import Texts
from vlmae.evaluation import metrics
from vlmae.evaluation.clip_features import map_pairs
from vlmae.evaluation.encode import Encoded, EvalInputs, encode_texts, select_texts, take_texts
from vlmae.evaluation.intervals import Interval, mean_interval, positive_mean_interval
from vlmae.evaluation.ranking import (
    Direction,
    Ranked,
    Right,
    best_temperature,
    equal_ids,
    rank_candidates,
    renumbered,
    rerank,
    with_dual_softmax,
)
from vlmae.evaluation.result import Result
from vlmae.figures.answer_page import Item, Line, Shown
from vlmae.models.scoring import match_scores
from vlmae.runs.inference import EvalContext, take_rows
from vlmae.runs.tables import markdown_table

SHOWN = 5  # clips of each prediction


def evaluate_retrieval(context: EvalContext, inputs: EvalInputs) -> Result:
    """Rank every clip for every caption and every caption for every clip.

    Captions of equal tokens are one candidate, right for the clips of all its copies. Clips that
    cannot be decoded are left out with their captions, and counted.

    Returns:
      Metrics named `t2v_r1`, ..., `v2t_mean_log_rank` (`metrics.rank_metrics`). `*_info_nce` is the
      mean of -log of the softmax of the similarities (VTC, also where VTM ranks again) on the right
      candidates, at `*_temperature`: that of `inputs.temperatures`, or else the best one for this
      split. Those of random orders are `*_chance_r1`, .... Also `num_clips` and `bad_clips`. With
      `dual_softmax` there are `dual_softmax_t2v_r1`, ... too. A prediction and a picture for each
      caption: the five best clips.

    Raises:
      UserError: no caption has a usable clip.
    """
    data, clips, config, _, temperatures = inputs
    captions = select_texts(data.texts, np.isin(data.texts.media_ids, clips.media_ids))
    first, of_caption = unique_texts(captions)
    texts = encode_texts(context, first, keep_features=config.rerank_top_k > 0)
    directions = make_directions(texts, of_caption, captions, clips)
    if config.dual_softmax:
        dual = {k: with_dual_softmax(x, context.on_progress) for k, x in directions.items()}
        directions |= {f"dual_softmax_{name}": direction for name, direction in dual.items()}
    fitted = {
        name: temperatures.by_direction.get(name)
        or best_temperature(direction, context.on_progress)
        for name, direction in directions.items()
    }
    ranked = rank(
        directions,
        of_caption,
        fitted,
        config.rerank_top_k,
        lambda pairs: score_pairs(context, texts, clips, pairs, config.frame_ensemble),
        add_first=config.rerank_by == "sum",
        on_progress=context.on_progress,
    )
    result, intervals = {}, {}
    for name, direction in directions.items():
        values = metrics.rank_metrics(ranked[name].ranks)
        values |= {"info_nce": float(ranked[name].info_nce.mean()), "temperature": fitted[name]}
        if direction.dual is None:  # chance is the same with it
            counts = np.diff(direction.right.starts)
            chance = metrics.chance_metrics(counts, direction.right.num_items)
            values |= {f"chance_{key}": value for key, value in chance.items()}
        result |= {f"{name}_{key}": value for key, value in values.items()}
        intervals |= rank_intervals(name, ranked[name], direction.media_ids)
    usable = len(clips.media_ids)
    result |= {"num_clips": float(usable), "bad_clips": float(data.num_clips - usable)}
    right = directions["t2v"].right
    predictions, items = describe(ranked["t2v"], right, captions, clips, data.names)
    facts = {"temperature_split": temperatures.split}
    return Result(result, intervals, predictions, items, facts)


def make_directions(
    texts: Encoded,
    of_caption: Int[np.ndarray, " q"],
    captions: Texts,
    clips: Encoded,
) -> dict[str, Direction]:
    """Set up both directions.

    The similarity of a pair is the mean over frames of the inner products (VTC).

    Args:
      texts: encoded captions without copies.
      of_caption: place of each caption among `texts`.
      captions: the queries of text to video.
      clips: its candidates.
    """
    own_clips = equal_ids(captions.media_ids, clips.media_ids)
    own_texts = renumbered(equal_ids(clips.media_ids, captions.media_ids), of_caption)
    return {
        "t2v": Direction(
            texts.embeddings[of_caption], clips.embeddings, own_clips, captions.media_ids
        ),
        "v2t": Direction(clips.embeddings, texts.embeddings, own_texts, clips.media_ids),
    }


def rank(
    directions: dict[str, Direction],
    of_caption: Int[np.ndarray, " q"],
    temperatures: dict[str, float],
    top_k: int = 0,
    match: Callable[[Int[np.ndarray, "p 2"]], Float[np.ndarray, " p"]] | None = None,
    *,
    add_first: bool = False,
    keep: int = SHOWN,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Ranked]:
    """Rank every direction, and keep the `keep` best candidates of each query.

    The `top_k` best of each query are ordered by the scores of `match` instead (SMAUG, downstream),
    or by their sum with the first scores over the temperature. The sum is what VTM's negatives ask
    for (ours): drawn by the softmax of VTC, they make its best score the logarithm of how much
    likelier a pair is than VTC says.
    Neither batch size nor device count changes the result.

    Args:
      directions: see `make_directions`.
      of_caption: place of each caption among the texts.
      temperatures: of InfoNCE, by direction.
      top_k: candidates of each query that are scored again; 0 for none.
      match: scores pairs of a text and a clip, given by their places.
      add_first: order by the sum.
      keep: candidates in the result.
      on_progress: called after each block of queries.
    """
    ranked = {
        name: rank_candidates(direction, max(keep, top_k), temperatures[name], on_progress)
        for name, direction in directions.items()
    }
    if not top_k:
        return ranked
    # A pair among the top k of both directions is scored once, and copies of a caption are one.
    num_clips = np.int64(len(directions["v2t"].queries))
    keys = {
        "t2v": of_caption[:, None] * num_clips + ranked["t2v"].best[:, :top_k],
        "v2t": ranked["v2t"].best[:, :top_k] * num_clips + np.arange(num_clips)[:, None],
    }
    unique = np.unique(np.concatenate([key.ravel() for key in keys.values()]))
    matching = match(np.stack(np.divmod(unique, num_clips), axis=1))
    for name, key in keys.items():
        second = matching[np.searchsorted(unique, key)]
        if add_first:
            second = second + ranked[name].scores[:, :top_k] / temperatures[name]
        ranked[name] = rerank(ranked[name], second, directions[name].right)
    return ranked


def unique_texts(captions: Texts) -> tuple[Texts, Int[np.ndarray, " q"]]:
    """Keep the first of all captions that are equal to the model, and number each one's own.

    Data sets repeat captions (templates, "a man is singing"). Every copy of a wrong one would be a
    rival of the right one.
    """
    _, first, number = np.unique(captions.text_ids, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)  # as the captions come
    place = np.argsort(order)
    return take_texts(captions, first[order]), place[number.ravel()]


def rank_intervals(
    name: str, ranked: Ranked, media_ids: Int[np.ndarray, " q"]
) -> dict[str, Interval]:
    """Compute confidence intervals of the means over queries, each in the unit of its metric.

    The temperature of InfoNCE counts as given; at its best its error is of second order.
    """
    of_one = {f"r{k}": ranked.ranks <= k for k in metrics.RECALL_AT} | {"mrr": 1 / ranked.ranks}
    positive = {"mean_log_rank": np.log(ranked.ranks), "info_nce": ranked.info_nce}
    intervals = {key: mean_interval(values, media_ids) for key, values in of_one.items()}
    intervals |= {key: positive_mean_interval(x, media_ids) for key, x in positive.items()}
    return {f"{name}_{key}": pair for key, pair in intervals.items() if math.isfinite(pair[1])}


def describe(
    ranked: Ranked, right: Right, captions: Texts, clips: Encoded, names: Sequence[str]
) -> tuple[list[dict], list[Item]]:
    """List the rank of each caption's clip and the five best clips, as records and to be drawn.

    Another clip that has the very same caption counts as wrong, but is not drawn as wrong.
    """
    best, scores = ranked.best[:, :SHOWN], ranked.scores[:, :SHOWN]
    rows, is_right = clips.rows[best], right.contains(best)
    predictions, items = [], []
    described = {*zip(captions.rows.tolist(), captions.captions, strict=True)}
    for query, caption in enumerate(captions.captions):
        of_clips = [round(float(score), 4) for score in scores[query]]
        rank, own = int(ranked.ranks[query]), rows[query].tolist()
        found = {names[row]: score for row, score in zip(own, of_clips, strict=True)}
        predictions.append({"caption": caption, "rank": rank, "clips": found})
        shown = [
            Shown(row, f"{score:.3f}, same caption", None)
            if (row, caption) in described and not correct
            else Shown(row, f"{score:.3f}", bool(correct))
            for row, score, correct in zip(own, of_clips, is_right[query], strict=True)
        ]
        items.append(Item(caption, shown, [Line(f"rank of its clip: {rank}")]))
    return predictions, items


def score_pairs(
    context: EvalContext,
    texts: Encoded,
    clips: Encoded,
    pairs: Int[np.ndarray, "p 2"],
    ensemble: str = "concat",
) -> Float[np.ndarray, " p"]:
    """Score pairs of a text and a clip with the matching head."""
    text_rows, clip_rows = pairs.T

    def text_of(rows: Int[np.ndarray, " b"]) -> tuple[PyTree]:
        return (take_rows(texts.features, text_rows[rows]),)

    rows = clips.rows[clip_rows]
    return map_pairs(context, match_scores, clips.features, rows, text_of, ensemble=ensemble)


COLUMNS = {  # heading -> metric, decimals
    "R@1": ("r1", 1),
    "R@5": ("r5", 1),
    "R@10": ("r10", 1),
    "MRR": ("mrr", 1),
    "median rank": ("median_rank", 1),
    "mean rank": ("mean_rank", 1),
    "mean log rank": ("mean_log_rank", 3),
    "InfoNCE": ("info_nce", 3),
}


def format_retrieval(result: dict[str, float]) -> str:
    """Format the metrics as a Markdown table, with those of chance."""
    titles = {"t2v": "text to video", "v2t": "video to text"}
    titles |= {f"dual_softmax_{key}": f"{title}, dual softmax" for key, title in titles.items()}
    titles |= {"t2v_chance": f"chance, text to video ({result['num_clips']:.0f} clips)"}
    rows = [["", *COLUMNS]]
    for prefix, title in titles.items():
        values = [(result.get(f"{prefix}_{name}"), digits) for name, digits in COLUMNS.values()]
        if f"{prefix}_r1" in result:
            cells = ["" if value is None else f"{value:.{digits}f}" for value, digits in values]
            rows.append([title, *cells])
    return markdown_table(rows)
