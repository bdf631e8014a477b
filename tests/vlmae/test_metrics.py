"""The metrics on hand-made cases, against scikit-learn and against chance by simulation."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, top_k_accuracy_score

from vlmae.evaluators.metrics import (
    accuracy_by_kind,
    average_precision,
    best_ranks,
    bootstrap_interval,
    chance_recall,
    dual_softmax,
    f1_scores,
    rerank,
    retrieval_metrics,
)


def ranks(scores: list, correct: list) -> list[int]:
    return best_ranks(np.array(scores, float), np.array(correct, bool)).tolist()


@pytest.mark.parametrize(
    ("scores", "correct", "rank"),
    [
        ([0.9, 0.5, 0.1], [1, 0, 0], 1),
        ([0.9, 0.5, 0.1], [0, 1, 0], 2),
        ([0.9, 0.5, 0.1], [0, 0, 1], 3),
        ([0.9, 0.5, 0.1], [0, 1, 1], 2),  # the best of several correct items counts
        ([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], 1),
        ([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1], 3),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], 4),  # a tie with a wrong item is lost ...
        ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 0], 2),
        ([0.5, 0.5, 0.1, 0.1], [1, 1, 0, 0], 1),  # ... but correct items do not compete
        ([0.1, 0.2], [1, 1], 1),
    ],
)
def test_best_ranks(scores, correct, rank):
    assert ranks([scores], [correct]) == [rank]


def test_every_query_has_its_own_rank():
    assert ranks([[3, 2, 1], [3, 2, 1], [1, 2, 3]], np.eye(3)) == [1, 2, 1]


def test_a_query_without_correct_item_is_an_error():
    with pytest.raises(ValueError, match="2 queries have no correct item, the first is 1"):
        ranks(np.zeros((4, 2)), [[1, 0], [0, 0], [0, 1], [0, 0]])


def test_nan_scores_are_an_error():
    with pytest.raises(ValueError, match="1 retrieval scores are NaN"):
        ranks([[0.0, np.nan], [0.0, 1.0]], np.eye(2))


def test_recall_and_ranks_of_a_hand_made_case():
    order = -np.arange(20.0)  # item j has rank j + 1
    correct = np.zeros((4, 20), bool)
    correct[[0, 1, 2, 3], [0, 4, 9, 19]] = True
    assert retrieval_metrics(np.tile(order, (4, 1)), correct) == {
        "r1": 25.0,
        "r5": 50.0,
        "r10": 75.0,
        "median_rank": 7.5,
        "mean_rank": 9.0,
    }


def test_recall_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 30, 200)
    correct = np.eye(30, dtype=bool)[labels]
    scores = rng.normal(size=(200, 30)) + correct
    result = retrieval_metrics(scores, correct)
    for k in (1, 5, 10):
        expected = 100 * top_k_accuracy_score(labels, scores, k=k, labels=np.arange(30))
        assert result[f"r{k}"] == pytest.approx(expected)
    assert 5 < result["r1"] < 95, "the case is neither trivial nor hopeless"


@pytest.mark.parametrize("k", [1, 5, 10])
def test_chance_recall_agrees_with_random_orders(k):
    rng = np.random.default_rng(0)
    correct = np.arange(16) < np.array([[1], [2], [3], [12]])
    simulated = np.mean(
        [100 * (best_ranks(rng.random((4, 16)), correct) <= k).mean() for _ in range(4000)]
    )
    assert chance_recall(correct, k) == pytest.approx(simulated, abs=1.2)  # 3 standard deviations


def test_chance_recall_of_one_correct_item_is_k_of_n():
    assert chance_recall(np.eye(128, dtype=bool), 5) == pytest.approx(100 * 5 / 128)
    assert chance_recall(np.eye(4, dtype=bool), 10) == pytest.approx(100)


def ordered(scores: np.ndarray) -> list[list[int]]:
    return np.argsort(-scores, axis=1, kind="stable").tolist()


def test_rerank_orders_the_top_by_the_second_score_and_the_rest_by_the_first():
    first = np.array([[0.9, 0.1, 0.8, 0.2, 0.7], [0.1, 0.2, 0.3, 0.4, 0.5]])
    second = np.array([[-9, np.nan, -7, np.nan, -8], [np.nan, np.nan, 5, 7, 6]])
    assert ordered(rerank(first, second, 3)) == [[2, 4, 0, 3, 1], [3, 4, 2, 1, 0]]


def test_rerank_agrees_with_sorting():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 20, 12))
    for top_k in (1, 5, 12, 40):
        expected = []
        for a, b in zip(first, second, strict=True):
            best = sorted(range(12), key=lambda j, a=a: -a[j])
            top = sorted(best[:top_k], key=lambda j, b=b: -b[j])
            expected.append(top + best[top_k:])
        assert ordered(rerank(first, second, top_k)) == expected


def test_rerank_keeps_ties_so_that_a_constant_second_score_earns_nothing():
    first, correct = np.array([[0.9, 0.8, 0.7, 0.1]]), np.eye(4, dtype=bool)
    scores = rerank(first, np.zeros((1, 4)), 3)
    for item, rank in enumerate([3, 3, 3, 4]):
        assert best_ranks(scores, correct[item : item + 1]) == [rank]


def test_rerank_does_not_hide_a_second_score_that_is_nan():
    second = np.array([[np.nan, 1.0, 2.0]])
    with pytest.raises(ValueError, match="NaN"):
        best_ranks(rerank(np.array([[3.0, 2.0, 1.0]]), second, 2), np.eye(1, 3, dtype=bool))


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_and_f1_agree_with_scikit_learn(levels):
    """With many ties, some, and none."""
    rng = np.random.default_rng(levels)
    correct = rng.random((60, 7)) < 0.3
    scores = rng.integers(0, levels, correct.shape) / levels
    ours = average_precision(scores, correct)
    theirs = average_precision_score(correct, scores, average=None)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    predicted = scores > 0.5
    for average in ("micro", "macro"):
        theirs = 100 * f1_score(correct, predicted, average=average, zero_division=0)
        assert f1_scores(predicted, correct)[f"{average}_f1"] == pytest.approx(theirs, abs=1e-9)


def test_a_class_of_no_row_has_no_average_precision():
    correct = np.array([[1, 0], [0, 0]], bool)
    values = average_precision(np.array([[0.2, 0.1], [0.9, 0.3]]), correct)
    assert values[0] == 0.5 and np.isnan(values[1])
    assert f1_scores(correct, correct) == {"micro_f1": 100, "macro_f1": 50}


def test_accuracy_of_each_kind():
    right = np.array([1, 0, 0, 1, 1], bool)
    kinds = ("who", "what", "what", "what", "who")
    assert accuracy_by_kind(right, kinds) == {"what": pytest.approx(100 / 3), "who": 100}


def test_bootstrap_of_single_queries_against_the_normal_interval():
    """Of 400 independent queries, 30 % right: 1.96 standard errors to both sides."""
    values = np.repeat([1.0, 0.0], [120, 280])
    low, high = bootstrap_interval(values, np.arange(400), resamples=4000)
    error = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == pytest.approx((0.3 - error, 0.3 + error), abs=0.004)


def test_bootstrap_draws_whole_groups():
    """Ten equal queries of a clip tell no more than one."""
    values = np.repeat([1.0, 0.0], [12, 28])
    alone = bootstrap_interval(values, np.arange(40), resamples=2000)
    tenfold = bootstrap_interval(np.repeat(values, 10), np.repeat(np.arange(40), 10), 2000)
    assert tenfold == pytest.approx(alone)
    assert bootstrap_interval(np.ones(6), np.array([0, 0, 0, 1, 1, 2]), 10) == (1, 1)


def test_dual_softmax_prefers_what_nothing_else_wants():
    scores = np.array([[0.5, 0.49], [0.9, 0.1]])  # both queries like item 0 best
    assert scores.argmax(axis=1).tolist() == [0, 0]
    assert dual_softmax(scores, 0.01).argmax(axis=1).tolist() == [1, 0]
    weights = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum(axis=0)
    np.testing.assert_allclose(dual_softmax(scores, 0.5), scores * weights)
