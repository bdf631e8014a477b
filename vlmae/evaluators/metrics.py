"""Retrieval metrics in NumPy. Scores are higher for better matches; ranks start at 1."""

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
