"""95 % confidence intervals of metrics, chosen by simulation (ours).

Queries about one clip, or about clips of one id, are not independent, so the unit is the group of
them. The jackknife leaves out one group at a time; from the spread of the metric follows the number
of independent yes-no answers that would spread as much. The interval is Wilson's (1927) for that
number, with Student's t for the number of groups. So it lies within 0 and 100, contains the metric,
and has a width where all answers are right. Means without an upper bound, such as that of log
ranks, have Student's interval of the jackknife's variance. `experiments.benchmarks.intervals`
measures coverage.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

Interval = tuple[float, float]
_NOTHING = 1e-12  # variances below are rounding errors
_RARE = 200  # correct rows of a label for which groups are left out exactly


class Jackknife(NamedTuple):
    """Metric as a fraction, of all groups and without each of them."""

    value: float
    without: Float[np.ndarray, " g"]

    def interval(self) -> Interval:
        """Compute the interval, in percent; of one group it is everything."""
        groups = len(self.without)
        if groups < 2:
            return 0.0, 100.0
        variance = (groups - 1) * float(self.without.var())
        of_one = self.value * (1 - self.value)  # variance of a yes-no answer
        # All right or all wrong: the groups' spread says nothing, so each counts as one answer.
        answers = of_one / variance if min(of_one, variance) > _NOTHING else groups
        z = stats.t.ppf(0.975, groups - 1) ** 2 / answers
        middle, half = self.value + z / 2, np.sqrt(z * (of_one + z / 4))
        low, high = (100 * float((middle + side * half) / (1 + z)) for side in (-1, 1))
        return max(low, 0.0), min(high, 100.0)


def mean_interval(
    values: Bool[np.ndarray, " q"] | Float[np.ndarray, " q"], groups: Int[np.ndarray, " q"]
) -> Interval:
    """Compute the interval of a mean of values within 0 and 1, in percent.

    Such as a share of right answers, an accuracy or a recall, or a mean reciprocal rank.
    """
    jackknife = mean_jackknife(values, groups)
    return jackknife.interval() if jackknife else (0.0, 100.0)


def positive_mean_interval(
    values: Float[np.ndarray, " q"], groups: Int[np.ndarray, " q"]
) -> Interval:
    """Compute the interval of a mean of values from 0 without a bound above, by Student's t.

    Such as a mean logarithm of ranks, or InfoNCE at a given temperature.
    """
    jackknife = mean_jackknife(values, groups)
    if not jackknife:
        return 0.0, math.inf
    spread = (len(jackknife.without) - 1) * float(jackknife.without.var())
    half = float(stats.t.ppf(0.975, len(jackknife.without) - 1)) * math.sqrt(spread)
    return max(jackknife.value - half, 0.0), jackknife.value + half


def mean_jackknife(
    values: Bool[np.ndarray, " q"] | Float[np.ndarray, " q"], groups: Int[np.ndarray, " q"]
) -> Jackknife | None:
    """Compute the mean without each group; None if there is but one."""
    group = _numbered(groups)
    size, sums = np.bincount(group), np.bincount(group, weights=values)
    if len(size) < 2:
        return None
    return Jackknife(sums.sum() / size.sum(), (sums.sum() - sums) / (size.sum() - size))


def label_intervals(
    scores: Float[np.ndarray, "n c"],
    predicted: Bool[np.ndarray, "n c"],
    correct: Bool[np.ndarray, "n c"],
    groups: Int[np.ndarray, " n"],
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Interval]:
    """Compute the intervals of `map`, `micro_f1` and `macro_f1`, label by label.

    Labels are sorted once, so thousands of them for 10,000 clips take seconds. `on_progress` is
    called after each label.
    """
    group = _numbered(groups)
    jackknives = {"map": map_jackknife(scores, correct, group, on_progress)}
    jackknives |= f1_jackknives(predicted, correct, group, on_progress)
    return {name: jackknife.interval() for name, jackknife in jackknives.items()}


def map_jackknife(
    scores: Float[np.ndarray, "n c"],
    correct: Bool[np.ndarray, "n c"],
    group: Int[np.ndarray, " n"],
    on_progress: Callable[[], None] = lambda: None,
) -> Jackknife:
    """Compute mean average precision without each group; labels of no clip are left out."""
    total, count = np.zeros(group.max() + 1), np.zeros(group.max() + 1)
    values = []
    for i in np.flatnonzero(correct.any(axis=0)):
        result = precision_jackknife(scores[:, i], correct[:, i], group)
        values.append(result.value)
        # Without the only group of its clips a label is absent, as it would be in the metric.
        there = ~np.isnan(result.without)
        total += np.where(there, result.without, 0)
        count += there
        on_progress()
    return Jackknife(float(np.mean(values)), total[count > 0] / count[count > 0])


def precision_jackknife(
    scores: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], group: Int[np.ndarray, " n"]
) -> Jackknife:
    """Compute the average precision of a label without each group; NaN where no clip is left.

    Rows of equal score count together, as in `average_precision`. The effects of a group's rows are
    added up. That is exact for groups of one row, and close for frequent labels; for rare ones
    groups are left out as a whole.
    """
    block = np.unique(-scores, return_inverse=True)[1]  # rows of equal score, best first
    rows, hits = np.bincount(block).cumsum(), np.bincount(block, weights=correct)
    right = hits.cumsum()
    count, fewer = right[-1], np.maximum(rows - 1, 1)

    def below(terms: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
        return terms[::-1].cumsum()[::-1]  # of this block and all of lower scores

    kept = hits * right / rows
    total = kept.sum()
    without_wrong = (total + below(hits * right / fewer - kept)) / count
    precision = (right - 1) / fewer  # at a block, without one of its correct rows
    without_right = total + below(hits * precision - kept) - precision
    without_right /= max(count - 1, 1)
    effect = np.where(correct, without_right[block], without_wrong[block]) - total / count
    without = total / count + np.bincount(group, weights=effect)

    found = np.flatnonzero(correct)
    if count <= _RARE and len(without) < len(group):
        ranks = Ranks(block, rows, right)
        without[np.unique(group[found])] = without_groups(ranks, correct, group)
    elif count == 1:
        without[group[found]] = np.nan
    return Jackknife(float(total / count), without)


class Ranks(NamedTuple):
    """Rows ordered by score, those of equal score in one block."""

    block: Int[np.ndarray, " n"]  # of each row, best first
    rows: Int[np.ndarray, " k"]  # in each block and above
    right: Float[np.ndarray, " k"]  # correct ones of these


def without_groups(
    ranks: Ranks, correct: Bool[np.ndarray, " n"], group: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " h"]:
    """Compute the average precision without each of the groups that hold a correct row, exactly.

    NaN for a group that holds all of them. Costs correct rows times rows of these groups.
    """
    found = np.flatnonzero(correct)
    members = np.flatnonzero(np.isin(group, group[found]))
    members = members[np.argsort(group[members], kind="stable")]
    own, starts = np.unique(group[members], return_index=True)
    place = ranks.block[found][:, None]
    above = ranks.block[members] <= place  # scored at least as high as a correct row
    rows = ranks.rows[place] - np.add.reduceat(above, starts, axis=1, dtype=int)
    right = ranks.right[place] - np.add.reduceat(
        above & correct[members], starts, axis=1, dtype=int
    )
    others = group[found][:, None] != own
    count = others.sum(axis=0)
    mean = (others * right / np.maximum(rows, 1)).sum(axis=0) / np.maximum(count, 1)
    return np.where(count, mean, np.nan)


def f1_jackknives(
    predicted: Bool[np.ndarray, "n c"],
    correct: Bool[np.ndarray, "n c"],
    group: Int[np.ndarray, " n"],
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Jackknife]:
    """Compute micro and macro F1 (`f1_scores`) without each group."""
    # The last place of each array below stands for leaving out nothing.
    groups, labels = group.max() + 1, correct.shape[1]
    all_hits, all_either, macro = (np.zeros(groups + 1) for _ in range(3))
    for i in range(labels):
        counts = predicted[:, i].astype(int) + correct[:, i]
        hits = _without(np.bincount(group, predicted[:, i] & correct[:, i], groups))
        either = _without(np.bincount(group, counts, groups))
        macro += 2 * hits / np.maximum(either, 1) / labels
        all_hits += hits
        all_either += either
        on_progress()
    micro = 2 * all_hits / np.maximum(all_either, 1)
    return {
        name: Jackknife(float(values[-1]), values[:-1])
        for name, values in (("micro_f1", micro), ("macro_f1", macro))
    }


def _without(counts: Float[np.ndarray, " g"]) -> Float[np.ndarray, " g+1"]:
    """Sum all groups but one, for each of them, and at the end all of them."""
    return counts.sum() - np.append(counts, 0)


def _numbered(groups: Int[np.ndarray, " q"]) -> Int[np.ndarray, " q"]:
    """Replace group ids by numbers from 0."""
    return np.unique(groups, return_inverse=True)[1]
