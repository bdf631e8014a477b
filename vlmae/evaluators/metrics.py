"""The metrics in NumPy. Scores are higher for better matches; ranks start at 1."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

RECALL_AT = (1, 5, 10)


def best_ranks(
    scores: Float[np.ndarray, "q n"], correct: Bool[np.ndarray, "q n"]
) -> Int[np.ndarray, " q"]:
    """Rank of each query's best-placed correct item among the wrong ones.

    With several correct items the best one counts. Ties with wrong items count against the query,
    so that a model that scores everything alike is not rewarded.

    Raises:
      ValueError: a query has no correct item (named by its row), or a score is NaN.
    """
    missing = np.flatnonzero(~correct.any(axis=1))
    if len(missing):
        raise ValueError(f"{len(missing)} queries have no correct item, the first is {missing[0]}")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} retrieval scores are NaN")
    best = np.where(correct, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((scores >= best) & ~correct).sum(axis=1)


def retrieval_metrics(
    scores: Float[np.ndarray, "q n"], correct: Bool[np.ndarray, "q n"]
) -> dict[str, float]:
    """Recall at 1, 5 and 10 as percentages, median and mean rank."""
    ranks = best_ranks(scores, correct)
    recall = {f"r{k}": 100.0 * float((ranks <= k).mean()) for k in RECALL_AT}
    return recall | {"median_rank": float(np.median(ranks)), "mean_rank": float(ranks.mean())}


def chance_recall(correct: Bool[np.ndarray, "q n"], k: int) -> float:
    """Recall at k, as a percentage, that a uniformly random order is expected to reach.

    A query with c correct among n items misses with probability C(n-c, k) / C(n, k).
    """
    n, counts = correct.shape[1], correct.sum(axis=1).astype(float)
    miss = np.ones(len(counts))
    for i in range(min(k, n)):
        miss *= np.maximum(n - counts - i, 0) / (n - i)
    return 100.0 * float(1 - miss.mean())


def rerank(
    first: Float[np.ndarray, "q n"], second: Float[np.ndarray, "q n"], top_k: int
) -> Float[np.ndarray, "q n"]:
    """Scores that order each query's `top_k` by `second` and everything else, below, by `first`.

    `second` need hold a number only for the top k of `first` (NaN elsewhere is fine; a NaN among
    the top k stays one). Equal scores stay equal. `top_k` is at least 1.
    """
    order = np.argsort(-first, axis=1, kind="stable")
    in_top = np.argsort(order, axis=1) < top_k
    lowest = np.where(in_top, second, np.inf).min(axis=1, keepdims=True)
    first = first.astype(float)
    below = first - first.max(axis=1, keepdims=True) + lowest - 1
    return np.where(in_top, second, below)


def average_precision(
    scores: Float[np.ndarray, "n c"], correct: Bool[np.ndarray, "n c"]
) -> Float[np.ndarray, " c"]:
    """Average precision of every class (column), as a fraction; NaN where no row is correct.

    The mean over a class's correct rows of the precision among all rows scored at least as high,
    so rows of equal score count together.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    scores = np.take_along_axis(scores, order, axis=0)
    correct = np.take_along_axis(correct, order, axis=0)
    hits = correct.cumsum(axis=0)
    precision = np.full(scores.shape[1], np.nan)
    for column in np.flatnonzero(correct.any(axis=0)):
        # Rows that score at least as high as each row: those up to its last equal.
        upto = np.searchsorted(-scores[:, column], -scores[:, column], side="right")
        of_row = hits[upto - 1, column] / upto
        precision[column] = of_row[correct[:, column]].mean()
    return precision


def f1_scores(
    predicted: Bool[np.ndarray, "n c"], correct: Bool[np.ndarray, "n c"]
) -> dict[str, float]:
    """Micro F1 (over all decisions) and macro F1 (mean over classes), in percent.

    A class that is neither predicted nor correct anywhere has an F1 of 0.
    """
    hits = (predicted & correct).sum(axis=0)
    either = predicted.sum(axis=0) + correct.sum(axis=0)
    micro = 2 * hits.sum() / max(either.sum(), 1)
    macro = (2 * hits / np.maximum(either, 1)).mean()
    return {"micro_f1": 100 * float(micro), "macro_f1": 100 * float(macro)}


def accuracy_by_kind(right: Bool[np.ndarray, " q"], kinds: Sequence[str]) -> dict[str, float]:
    """Percent right of each kind of question, in the order of the kinds' names."""
    kinds = np.asarray(kinds)
    return {str(kind): 100 * float(right[kinds == kind].mean()) for kind in np.unique(kinds)}


def bootstrap_interval(
    values: Float[np.ndarray, " q"],
    groups: Int[np.ndarray, " q"],
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of the mean, by the bootstrap over groups.

    Queries about the same clip are no independent draws, so whole groups are drawn. The same
    values and seed give the same interval.
    """
    _, group = np.unique(groups, return_inverse=True)
    sizes, sums = np.bincount(group), np.bincount(group, weights=values)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=resamples)
    low, high = np.percentile((drawn @ sums) / (drawn @ sizes), [2.5, 97.5])
    return float(low), float(high)


def dual_softmax(scores: Float[np.ndarray, "q n"], temperature: float) -> Float[np.ndarray, "q n"]:
    """Scores times their softmax over the queries (rows) of each item (Cheng et al. 2021, CAMoE).

    An item that answers another query better counts less; it uses all queries of the test set.
    """
    logits = scores / temperature
    weights = np.exp(logits - logits.max(axis=0, keepdims=True))
    return scores * weights / weights.sum(axis=0, keepdims=True)
