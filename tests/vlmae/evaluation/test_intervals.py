"""Intervals: leaving groups out against computing anew, and coverage by a small simulation."""

import numpy as np
import pytest
from scipy import stats
from scipy.stats import binomtest, sem, t
from sklearn.metrics import average_precision_score, f1_score

from experiments.benchmarks.intervals import answered, coverage, labeled
from vlmae.evaluation import intervals
from vlmae.evaluation.intervals import (
    Jackknife,
    f1_jackknives,
    label_intervals,
    map_jackknife,
    mean_interval,
    positive_mean_interval,
    precision_jackknife,
)
from vlmae.evaluation.metrics import f1_scores


def test_many_single_answers_have_wilsons_interval():
    right = np.repeat([True, False], [1200, 2800])
    expected = binomtest(1200, 4000).proportion_ci(method="wilson")
    found = mean_interval(right, np.arange(4000))
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.01)


@pytest.mark.parametrize(("right", "wrong"), [(5, 2), (1, 8), (30, 70)])
def test_few_answers_by_the_formulas(right, wrong):
    """The jackknife's variance of a mean is that of n - 1 answers; Student's t has as many."""
    n, p = right + wrong, right / (right + wrong)
    t = stats.t.ppf(0.975, n - 1)
    center, half = (
        p + t**2 / (2 * (n - 1)),
        t * np.sqrt(p * (1 - p) / (n - 1) + t**2 / 4 / (n - 1) ** 2),
    )
    expected = [100 * (center + sign * half) / (1 + t**2 / (n - 1)) for sign in (-1, 1)]
    found = mean_interval(np.arange(n) < right, np.arange(n))
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_group_tells_no_more_than_one_answer():
    right = np.repeat([True, False], [12, 28])
    alone = mean_interval(right, np.arange(40))
    tenfold = mean_interval(np.repeat(right, 10), np.repeat(np.arange(40), 10))
    assert tenfold == pytest.approx(alone)
    assert mean_interval(right, np.zeros(40, int)) == (0, 100)


def test_means_without_a_bound_have_students_interval():
    """Of single values that of SciPy, of groups that of their means, never below zero."""
    values = np.random.default_rng(0).exponential(size=50)
    expected = t.interval(0.95, 49, values.mean(), sem(values))
    assert positive_mean_interval(values, np.arange(50)) == pytest.approx(expected)
    tenfold = positive_mean_interval(np.repeat(values, 10), np.repeat(np.arange(50), 10))
    assert tenfold == pytest.approx(expected)
    assert positive_mean_interval(np.array([0.0, 0.0, 9.0]), np.arange(3))[0] == 0
    assert positive_mean_interval(values, np.zeros(50, int)) == (0, np.inf)


def test_a_mean_reciprocal_rank_is_a_mean_of_fractions():
    """Between answers of 0 and 1, values spread less, so the interval is narrower than Wilson's."""
    values = 1 / np.random.default_rng(0).integers(1, 5, 1000)
    low, high = mean_interval(values, np.arange(1000))
    expected = t.interval(0.95, 999, values.mean(), sem(values))
    assert (low, high) == pytest.approx([100 * x for x in expected], abs=0.05)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_equal_answers_leave_doubt(share):
    """Of 50 right answers: close to Wilson's interval, never a width of zero."""
    low, high = mean_interval(np.full(50, share == 1), np.arange(50))
    expected = binomtest(round(50 * share), 50).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.4)
    assert low <= 100 * share <= high
    correct = np.eye(30, dtype=bool).repeat(2, axis=0)
    for low, high in label_intervals(1.0 * correct, correct, correct, np.arange(60)).values():
        assert low < 96 and high == 100


@pytest.mark.parametrize("rows_each", [1, 3])
@pytest.mark.parametrize("levels", [4, 1000])
def test_labels_without_each_group_agree_with_scikit_learn(rows_each, levels, monkeypatch):
    rng = np.random.default_rng(levels)
    correct = rng.random((30, 4)) < [0.02, 0.1, 0.3, 0.6]
    correct[4, 0] = True  # of one clip or few
    scores = rng.integers(0, levels, correct.shape) / levels
    group = np.arange(30) // rows_each
    found = map_jackknife(scores, correct, group)
    present = correct.any(axis=0)
    all_of_them = average_precision_score(correct[:, present], scores[:, present], average=None)
    f1 = f1_jackknives(scores > 0.5, correct, group)
    for g in range(group.max() + 1):
        kept = group != g
        present = correct[kept].any(axis=0)
        labels = correct[kept][:, present], scores[kept][:, present]
        theirs = average_precision_score(*labels, average=None)
        of_wrong = 0 if rows_each == 1 or correct[~kept].any(axis=0).all() else 0.01
        assert found.without[g] == pytest.approx(theirs.mean(), abs=1e-9 + of_wrong)
        for average in ("micro", "macro"):
            theirs = f1_score(correct[kept], scores[kept] > 0.5, average=average, zero_division=0)
            assert f1[f"{average}_f1"].without[g] == pytest.approx(theirs)
    assert found.value == pytest.approx(all_of_them.mean())
    # Frequent labels take the sum over the rows of a group, which is close.
    monkeypatch.setattr(intervals, "_RARE", 0)
    column, exact = correct[:, 3], precision_jackknife(scores[:, 3], correct[:, 3], group)
    np.testing.assert_allclose(exact.without, found_anew(scores[:, 3], column, group), atol=0.03)


def test_a_label_of_one_clip_is_absent_without_it():
    """And the metric itself without the only group of all labels."""
    scores, group = np.array([[0.9, 0.1], [0.5, 0.7], [0.1, 0.3]]), np.arange(3)
    correct = np.array([[1, 0], [0, 1], [0, 1]], bool)
    found = map_jackknife(scores, correct, group)
    assert found.without == pytest.approx([1.0, (1 + 1) / 2, (1 + 1) / 2])
    worse = map_jackknife(scores[::-1], correct, group)  # of label 1 ranks 1 and 2 without its best
    expected = [average_precision_score(correct[1:, 1], scores[::-1][1:, 1])]
    for g in (1, 2):
        kept = group != g
        expected.append(
            np.mean(
                [average_precision_score(correct[kept, i], scores[::-1][kept, i]) for i in (0, 1)]
            )
        )
    assert worse.without == pytest.approx(expected)
    only = map_jackknife(scores[:, :1], correct[:, :1], group)
    assert only.value == 1 and only.without == pytest.approx([1.0, 1.0])


def test_jackknives_hold_the_metric_itself():
    rng = np.random.default_rng(3)
    predicted, correct = rng.random((2, 20, 4)) < 0.4
    values = f1_scores(predicted, correct)
    for name, found in f1_jackknives(predicted, correct, np.arange(20) // 2).items():
        assert 100 * found.value == pytest.approx(values[name]) and len(found.without) == 10


def found_anew(scores, correct, group) -> list[float]:
    """Average precision without each group."""
    kept = [group != g for g in range(group.max() + 1)]
    return [average_precision_score(correct[k], scores[k]) for k in kept]


def test_the_metric_lies_in_its_interval():
    """Rare labels, where the bootstrap's percentiles missed it."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, found = labeled(rng, 60, 20, 0.03, several=False)
        for name, (low, high) in found.items():
            assert 0 <= low < values[name] < high <= 100


def test_a_mean_over_many_labels_may_be_surer_than_one_answer_for_each_clip():
    steady = Jackknife(0.5, 0.5 + 1e-5 * np.array([1, -1, 1, -1]))
    low, high = steady.interval()
    assert 49.9 < low < 50 < high < 50.1


@pytest.mark.parametrize("several", [False, True])
def test_coverage(several):
    """`experiments.benchmarks.intervals` in small; 3 standard deviations are 4 and 6 %."""
    for share in (0.1, 0.5, 0.97):
        found = coverage(answered, 300, 200, share, several)
        assert 0.9 <= found["accuracy"] <= 0.99
    found = coverage(labeled, 100, 100, 20, 0.04, several)
    assert all(0.88 <= x <= 1 for x in found.values()), found


def test_progress_is_reported_label_by_label():
    """The watchdog must not take thousands of labels for a process that hangs."""
    rng, calls = np.random.default_rng(0), []
    correct = rng.random((30, 7)) < 0.5
    scores = rng.random(correct.shape)
    label_intervals(scores, scores > 0.5, correct, np.arange(30), lambda: calls.append(1))
    assert len(calls) == 2 * 7  # for mAP and for F1
