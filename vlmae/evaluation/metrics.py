"""Metrics in NumPy. Scores are higher for better matches; ranks start at 1."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

RECALL_AT = (1, 5, 10)


def best_ranks(
    scores: Float[np.ndarray, "q n"], correct: Bool[np.ndarray, "q n"]
) -> Int[np.ndarray, " q"]:
    """Rank each query's best correct item among the incorrect ones.

    Ties with incorrect items count against the query, so that a model that scores everything alike
    is not rewarded.

    Raises:
      ValueError: a query has no correct item (named by its row), or a score is NaN.
    """
    _check_scores(scores, correct)
    best = np.where(correct, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((scores >= best) & ~correct).sum(axis=1)


def info_nce(
    scores: Float[np.ndarray, "q n"], correct: Bool[np.ndarray, "q n"], temperature: float
) -> Float[np.ndarray, " q"]:
    """Compute InfoNCE of each query: -log of the softmax on its correct items, taken together.

    Raises:
      ValueError: see `best_ranks`.
    """
    return Margins.of(scores, correct).info_nce(temperature)


class Margins(NamedTuple):
    """Scores below the best of each query, as InfoNCE at any temperature needs them."""

    of_all: Float[np.ndarray, "q n"]
    of_correct: Float[np.ndarray, " p"]  # query by query
    starts: Int[np.ndarray, " q"]  # of each query's

    @classmethod
    def of(cls, scores: Float[np.ndarray, "q n"], correct: Bool[np.ndarray, "q n"]) -> "Margins":
        """Subtract the best score of each query.

        Raises:
          ValueError: see `best_ranks`.
        """
        _check_scores(scores, correct)
        of_all = scores - scores.max(axis=1, keepdims=True)
        counts = correct.sum(axis=1)
        return cls(of_all, of_all[correct], np.cumsum(counts) - counts)

    def info_nce(self, temperature: float) -> Float[np.ndarray, " q"]:
        """Compute InfoNCE of each query."""
        logits = self.of_all / self.of_all.dtype.type(temperature)
        total = np.log(np.exp(logits, out=logits).sum(axis=1))
        # In logarithms, since the exponentials of items far below the best are 0 in float32.
        return total - np.logaddexp.reduceat(self.of_correct / temperature, self.starts)


def _check_scores(scores: Float[np.ndarray, "q n"], correct: Bool[np.ndarray, "q n"]) -> None:
    missing = np.flatnonzero(~correct.any(axis=1))
    if len(missing):
        raise ValueError(f"{len(missing)} queries have no correct item, the first is {missing[0]}")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} retrieval scores are NaN")


def rank_metrics(ranks: Int[np.ndarray, " q"]) -> dict[str, float]:
    """Compute recall at 1, 5 and 10 and mean reciprocal rank in percent, and means of ranks.

    Returns:
      `r1`, `r5`, `r10`, `mrr`, `median_rank`, `mean_rank` and `mean_log_rank`, which is the mean
      natural logarithm.
    """
    recall = {f"r{k}": 100.0 * float((ranks <= k).mean()) for k in RECALL_AT}
    return recall | {
        "mrr": 100.0 * float((1 / ranks).mean()),
        "median_rank": float(np.median(ranks)),
        "mean_rank": float(ranks.mean()),
        "mean_log_rank": float(np.log(ranks).mean()),
    }


def chance_metrics(num_correct: Int[np.ndarray, " q"], num_items: int) -> dict[str, float]:
    """Compute the expected metrics of uniformly random orders.

    A query with c correct among n items has them all behind rank r with the probability
    C(n-c, r) / C(n, r). InfoNCE is that of equal scores.

    Args:
      num_correct: correct items of each query, at least one.
      num_items: items that are ranked.

    Returns:
      `r1`, `r5`, `r10`, `mrr` in percent, `mean_log_rank` and `info_nce`.
    """
    counts, queries = np.unique(num_correct, return_counts=True)
    rank = np.arange(1, num_items + 1)
    at_rank = np.zeros(num_items)  # probability that a query has this rank
    for count, weight in zip(counts, queries / len(num_correct), strict=True):
        wrong = np.maximum(num_items - count - rank + 1, 0)  # left before each draw
        behind = np.cumprod(wrong / (num_items - rank + 1))
        at_rank += weight * -np.diff(behind, prepend=1.0)
    return {f"r{k}": 100 * float(at_rank[:k].sum()) for k in RECALL_AT} | {
        "mrr": 100 * float(at_rank @ (1 / rank)),
        "mean_log_rank": float(at_rank @ np.log(rank)),
        "info_nce": float(np.log(num_items / num_correct).mean()),
    }


def average_precision(
    scores: Float[np.ndarray, "n c"], correct: Bool[np.ndarray, "n c"]
) -> Float[np.ndarray, " c"]:
    """Compute the average precision of every class (column), a fraction; NaN without a correct row.

    It is the mean over a class's correct rows of the precision among all rows scored at least as
    high, so rows of equal score count together.
    """
    precision = np.full(scores.shape[1], np.nan)
    for column in np.flatnonzero(correct.any(axis=0)):  # one at a time, which holds no copies
        order = np.argsort(-scores[:, column], kind="stable")
        falling, right = -scores[order, column], correct[order, column]
        # Rows that score at least as high as each row: those up to its last equal.
        upto = np.searchsorted(falling, falling, side="right")
        precision[column] = (right.cumsum()[upto - 1] / upto)[right].mean()
    return precision


def f1_scores(
    predicted: Bool[np.ndarray, "n c"], correct: Bool[np.ndarray, "n c"]
) -> dict[str, float]:
    """Compute micro F1 (over all decisions) and macro F1 (mean over classes), in percent.

    A class that is neither predicted nor correct anywhere has an F1 of 0.
    """
    hits = (predicted & correct).sum(axis=0)
    either = predicted.sum(axis=0) + correct.sum(axis=0)
    micro = 2 * hits.sum() / max(either.sum(), 1)
    macro = (2 * hits / np.maximum(either, 1)).mean()
    return {"micro_f1": 100 * float(micro), "macro_f1": 100 * float(macro)}


def accuracy_by_kind(right: Bool[np.ndarray, " q"], kinds: Sequence[str]) -> dict[str, float]:
    """Compute the accuracy of each kind of question, in percent, sorted by the kinds' names."""
    kinds = np.asarray(kinds)
    return {str(kind): 100 * float(right[kinds == kind].mean()) for kind in np.unique(kinds)}
