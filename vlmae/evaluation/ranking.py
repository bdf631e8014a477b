"""Rankings of many candidates for many queries, in blocks of queries: no whole matrix is made.

In NumPy on the host, in float32. Processes divide the blocks, which follow from the number of
candidates alone, so no mesh and no number of processes changes a result.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar

from vlmae.evaluation.metrics import Margins, best_ranks, info_nce
from vlmae.parallel.sharding import gather

BLOCK_PAIRS = 1 << 22  # 16 MiB of scores, a few times over while a block is ranked
FIT_PAIRS = 1 << 25  # a temperature is fitted on queries with so many pairs, 128 MiB
DUAL_TEMPERATURE = 0.01  # of the dual softmax (ours)


class Right(NamedTuple):
    """Correct candidates of every query: `items[starts[i] : starts[i + 1]]`, ascending."""

    starts: Int[np.ndarray, " q+1"]
    items: Int[np.ndarray, " p"]
    num_items: int  # candidates, correct or not

    def mask(self, rows: Int[np.ndarray, " b"]) -> Bool[np.ndarray, "b n"]:
        """Return a row for each of some queries, True at its correct candidates."""
        mask = np.zeros((len(rows), self.num_items), bool)
        counts = np.diff(self.starts)[rows]
        places = _ranges(self.starts[rows], counts)
        mask[np.repeat(np.arange(len(rows)), counts), self.items[places]] = True
        return mask

    def contains(self, items: Int[np.ndarray, "q k"]) -> Bool[np.ndarray, "q k"]:
        """Return True where a candidate in row i is correct for query i."""
        queries = np.arange(len(items))  # int64, as are numbers of pairs
        pairs = np.repeat(queries, np.diff(self.starts)) * self.num_items + self.items
        return np.isin(queries[:, None] * self.num_items + items, pairs)


class Direction(NamedTuple):
    """Queries, and the candidates that are ranked for each by their inner products."""

    queries: Float[np.ndarray, "q e"]
    candidates: Float[np.ndarray, "n e"]
    right: Right
    media_ids: Int[np.ndarray, " q"]  # of the queries, see `intervals`
    dual: Float[np.ndarray, " n"] | None = None
    """Dual softmax: log-sum-exp of each candidate's scores over the queries; None without it."""

    def scores(self, rows: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b n"]:
        """Compute the scores of some queries with all candidates."""
        scores = self.queries[rows] @ self.candidates.T
        return scores if self.dual is None else scores * (2 / DUAL_TEMPERATURE) - self.dual

    def blocks(self, rows: Int[np.ndarray, " r"] | None = None) -> list[Int[np.ndarray, " b"]]:
        """Split some queries, or all, into blocks of at most `BLOCK_PAIRS` scores each."""
        rows = np.arange(len(self.queries)) if rows is None else rows
        size = max(1, BLOCK_PAIRS // len(self.candidates))
        return [rows[start : start + size] for start in range(0, len(rows), size)]


class Ranked(NamedTuple):
    """Result of a direction, query by query."""

    ranks: Int[np.ndarray, " q"]  # of the best correct candidate, from 1
    best: Int[np.ndarray, "q k"]  # candidates, best first
    scores: Float[np.ndarray, "q k"]  # theirs
    info_nce: Float[np.ndarray, " q"]


def equal_ids(queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " n"]) -> Right:
    """Find the candidates whose id is that of the query."""
    order = np.argsort(candidates, kind="stable")
    first, last = (np.searchsorted(candidates[order], queries, side) for side in ("left", "right"))
    starts = np.concatenate([[0], np.cumsum(last - first)])
    return Right(starts, order[_ranges(first, last - first)], len(candidates))


def _ranges(first: Int[np.ndarray, " r"], counts: Int[np.ndarray, " r"]) -> Int[np.ndarray, " p"]:
    """Join the ranges of integers that start at `first`."""
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(first - ends + counts, counts)


def renumbered(right: Right, numbers: Int[np.ndarray, " n"]) -> Right:
    """Replace every candidate by its number; candidates of one number become one."""
    rows = np.repeat(np.arange(len(right.starts) - 1), np.diff(right.starts))
    num_items = int(numbers.max()) + 1
    rows, items = np.divmod(np.unique(rows * num_items + numbers[right.items]), num_items)
    return Right(np.searchsorted(rows, np.arange(len(right.starts))), items, num_items)


def with_dual_softmax(
    direction: Direction, on_progress: Callable[[], None] = lambda: None
) -> Direction:
    """Weight scores by their softmax over the queries of each item (Cheng et al. 2021, CAMoE).

    An item that fits another query better counts less. It uses all queries of the test set. CAMoE
    multiplies score and weight, which turns the order around where scores are negative. Here the
    logarithm of the weight is added to the score over the temperature (ours): a higher score always
    means a higher result, whatever constant all scores share.
    """
    total = np.full(len(direction.candidates), -np.inf)
    for rows in direction.blocks():
        logits = direction.scores(rows) / DUAL_TEMPERATURE
        top = logits.max(axis=0)
        total = np.logaddexp(total, top + np.log(np.exp(logits - top).sum(axis=0)))
        on_progress()
    return direction._replace(dual=total.astype(np.float32))


def rank_candidates(
    direction: Direction,
    keep: int,
    temperature: float,
    on_progress: Callable[[], None] = lambda: None,
) -> Ranked:
    """Rank all candidates for every query, and keep the best `keep` (or all, if fewer).

    Processes divide the blocks; all must call this, and the result is whole in each.

    Args:
      direction: queries and candidates.
      keep: candidates of each query.
      temperature: of InfoNCE.
      on_progress: called after each block.

    Raises:
      ValueError: see `best_ranks`.
    """
    blocks, parts = direction.blocks(), jax.process_count()
    shares = [np.concatenate([np.arange(0), *blocks[i::parts]]) for i in range(parts)]
    own = blocks[jax.process_index() :: parts] or [np.arange(0)]
    ranked = []
    for rows in own:
        ranked.append(_rank_block(direction, rows, keep, temperature))
        on_progress()
    return _gather_shares(Ranked(*map(np.concatenate, zip(*ranked, strict=True))), shares)


def _rank_block(
    direction: Direction, rows: Int[np.ndarray, " b"], keep: int, temperature: float
) -> Ranked:
    scores, correct = direction.scores(rows), direction.right.mask(rows)
    best = top_k(scores, keep)
    return Ranked(
        best_ranks(scores, correct).astype(np.int32),
        best.astype(np.int32),
        np.take_along_axis(scores, best, axis=1),
        info_nce(scores, correct, temperature).astype(np.float32),
    )


def _gather_shares(own: Ranked, shares: list[Int[np.ndarray, " _"]]) -> Ranked:
    """Collect what the processes ranked, in the order of the queries."""
    if len(shares) == 1:
        return own
    most = max(map(len, shares))  # collectives want arrays of one shape

    def whole(x: np.ndarray) -> np.ndarray:
        padded = np.concatenate([x, np.zeros((most - len(x), *x.shape[1:]), x.dtype)])
        parts = gather(padded).reshape(len(shares), most, *x.shape[1:])
        result = np.empty((sum(map(len, shares)), *x.shape[1:]), x.dtype)
        for rows, part in zip(shares, parts, strict=True):
            result[rows] = part[: len(rows)]
        return result

    return Ranked(*map(whole, own))


def top_k(scores: Float[np.ndarray, "q n"], k: int) -> Int[np.ndarray, "q k"]:
    """Find the k highest scores of each row, best first; of equal ones the first come first."""
    n = scores.shape[1]
    if k >= n:
        return np.argsort(-scores, axis=1, kind="stable")
    best = np.argpartition(scores, n - k, axis=1)[:, n - k :]
    lowest = np.take_along_axis(scores, best[:, :1], axis=1)
    # Of several that equal the lowest, `argpartition` takes any.
    for row in np.flatnonzero((scores >= lowest).sum(axis=1) > k):
        above = np.flatnonzero(scores[row] > lowest[row])
        equal = np.flatnonzero(scores[row] == lowest[row])
        best[row] = np.concatenate([above, equal[: k - len(above)]])
    best.sort(axis=1)
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)


def best_temperature(direction: Direction, on_progress: Callable[[], None] = lambda: None) -> float:
    """Find the temperature of the lowest mean InfoNCE.

    It lies within a hundredth and a thousand standard deviations of a query's scores. Where there
    are more than `FIT_PAIRS` pairs, evenly spaced queries stand for all of them.

    Raises:
      ValueError: see `best_ranks`.
    """
    count = min(len(direction.queries), max(1, FIT_PAIRS // len(direction.candidates)))
    sample = np.unique(np.linspace(0, len(direction.queries) - 1, count).astype(int))
    blocks = [
        Margins.of(direction.scores(rows), direction.right.mask(rows))
        for rows in direction.blocks(sample)
    ]
    spread = float(np.mean([block.of_all.std(axis=1).mean() for block in blocks]))
    if not spread:  # all candidates are alike at any temperature
        return 1.0

    def total(log_temperature: float) -> float:
        on_progress()
        temperature = math.exp(log_temperature)
        return sum(float(block.info_nce(temperature).sum()) for block in blocks)

    bounds = np.log(spread) + np.log([1e-2, 1e3])
    # To a thousandth, as InfoNCE changes with the square of an error at its lowest point.
    found = minimize_scalar(total, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    return math.exp(found.x)


def rerank(ranked: Ranked, second: Float[np.ndarray, "q k"], right: Right) -> Ranked:
    """Order the k best of every query by other scores; all others stay below, in their order.

    A tie counts against the query, as in `best_ranks`. InfoNCE stays that of the first scores.

    Args:
      ranked: with at least k candidates of every query.
      second: higher is better; column j is about candidate `best[:, j]`.
      right: the correct candidates.

    Raises:
      ValueError: a score is NaN.
    """
    if np.isnan(second).any():
        raise ValueError(f"{int(np.isnan(second).sum())} retrieval scores are NaN")
    k = second.shape[1]
    top, is_right = ranked.best[:, :k], right.contains(ranked.best[:, :k])
    highest = np.where(is_right, second, -np.inf).max(axis=1, keepdims=True)
    ranks = 1 + ((second >= highest) & ~is_right).sum(axis=1)
    order = np.lexsort((top, -second), axis=1)
    best, scores = ranked.best.copy(), ranked.scores.astype(float)
    best[:, :k] = np.take_along_axis(top, order, axis=1)
    # Moved below the k best, so that the kept scores still descend.
    scores[:, k:] += second.min(axis=1, keepdims=True) - 1 - scores[:, :1]
    scores[:, :k] = np.take_along_axis(second, order, axis=1)
    # Without a correct one among the k best, all of those are ahead of it, as they were.
    return ranked._replace(
        ranks=np.where(is_right.any(axis=1), ranks, ranked.ranks), best=best, scores=scores
    )
