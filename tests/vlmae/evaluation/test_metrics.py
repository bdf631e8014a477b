"""The metrics on hand-made cases, against scikit-learn and against chance by simulation."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import hypergeom, rankdata
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    label_ranking_average_precision_score,
    log_loss,
    top_k_accuracy_score,
)

from vlmae.evaluation.metrics import (
    accuracy_by_kind,
    average_precision,
    best_ranks,
    chance_metrics,
    f1_scores,
    info_nce,
    rank_metrics,
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
    assert rank_metrics(best_ranks(np.tile(order, (4, 1)), correct)) == {
        "r1": 25.0,
        "r5": 50.0,
        "r10": 75.0,
        "mrr": pytest.approx(100 * (1 + 1 / 5 + 1 / 10 + 1 / 20) / 4),
        "median_rank": 7.5,
        "mean_rank": 9.0,
        "mean_log_rank": pytest.approx(np.log(1 * 5 * 10 * 20) / 4),
    }


def test_recall_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 30, 200)
    correct = np.eye(30, dtype=bool)[labels]
    scores = rng.normal(size=(200, 30)) + correct
    result = rank_metrics(best_ranks(scores, correct))
    own = label_ranking_average_precision_score(correct, scores)  # of one right item: 1 / rank
    assert result["mrr"] == pytest.approx(100 * own)
    for k in (1, 5, 10):
        expected = 100 * top_k_accuracy_score(labels, scores, k=k, labels=np.arange(30))
        assert result[f"r{k}"] == pytest.approx(expected)
    assert 5 < result["r1"] < 95, "the case is neither trivial nor hopeless"


@pytest.mark.parametrize("name", ["r1", "r5", "r10", "mrr", "mean_log_rank"])
def test_chance_agrees_with_random_orders(name):
    rng = np.random.default_rng(0)
    correct = np.arange(16) < np.array([[1], [2], [3], [12]])
    simulated = [rank_metrics(best_ranks(rng.random((4, 16)), correct))[name] for _ in range(4000)]
    error = np.std(simulated) / np.sqrt(4000)
    expected = chance_metrics(correct.sum(axis=1), 16)[name]
    assert np.mean(simulated) == pytest.approx(expected, abs=3 * error)


def test_chance_of_one_correct_item():
    assert chance_metrics(np.ones(3, int), 128)["r5"] == pytest.approx(100 * 5 / 128)
    assert chance_metrics(np.ones(3, int), 4)["r10"] == pytest.approx(100)
    alike = info_nce(np.zeros((2, 128)), np.eye(2, 128, dtype=bool), 0.1).mean()
    assert chance_metrics(np.ones(2, int), 128)["info_nce"] == pytest.approx(alike)
    assert alike == pytest.approx(np.log(128))


@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
def test_info_nce_agrees_with_scikit_learn_and_scipy(temperature):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 30, 200)
    correct = np.eye(30, dtype=bool)[labels]
    scores = (rng.normal(size=(200, 30)) + 2 * correct) / 10
    ours = info_nce(scores, correct, temperature)
    probabilities = softmax(scores / temperature, axis=1)
    if temperature > 0.01:  # scikit-learn clips probabilities
        expected = log_loss(labels, probabilities, labels=np.arange(30))
        assert ours.mean() == pytest.approx(expected)
    several = rng.random((200, 30)) < 0.2
    several[:, 0] = True
    of_all = log_softmax(scores / temperature, axis=1)
    expected = -logsumexp(np.where(several, of_all, -np.inf), axis=1)
    np.testing.assert_allclose(info_nce(scores, several, temperature), expected, atol=1e-12)


def test_info_nce_of_a_hopeless_query_is_finite():
    """The softmax of the right item is far below the smallest float32."""
    scores = np.array([[1.0, 0.0]], np.float32)
    found = info_nce(scores, np.array([[False, True]]), 1e-3)
    assert found == pytest.approx(1000)


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


# --- properties

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 8))
LEVELS = st.integers(-3, 3)  # few, so that scores tie


@st.composite
def rankings(draw):
    """Scores with ties, and at least one correct item for each query."""
    shape = draw(SIZES)
    scores = draw(arrays.arrays(float, shape, elements=LEVELS))
    correct = draw(arrays.arrays(bool, shape))
    first = draw(arrays.arrays(int, shape[0], elements=st.integers(0, shape[1] - 1)))
    correct[np.arange(shape[0]), first] = True
    return scores, correct


@hypothesis.given(rankings(), st.integers(1, 9))
def test_ranks_against_scipy_and_whatever_does_not_change_the_order(ranking, seed):
    scores, correct = ranking
    found = best_ranks(scores, correct)
    for row, (s, c) in enumerate(zip(scores, correct, strict=True)):
        rivals = np.append(s[~c], s[c].max())  # the best correct item among the incorrect ones
        assert found[row] == rankdata(-rivals, method="max")[-1]
    order = np.random.default_rng(seed).permutation(scores.shape[1])
    np.testing.assert_array_equal(best_ranks(scores[:, order], correct[:, order]), found)
    np.testing.assert_array_equal(best_ranks(3 * scores - 5, correct), found)
    result = rank_metrics(found)
    assert result["r1"] <= result["r5"] <= result["r10"] <= 100
    assert result["mean_rank"] == pytest.approx(found.mean())
    assert result["median_rank"] == np.median(found)


@hypothesis.given(arrays.arrays(int, 5, elements=st.integers(1, 12)))
def test_chance_is_the_mean_over_queries_of_a_hypergeometric_draw(num_correct):
    found = chance_metrics(num_correct, 12)
    for k in (1, 5, 10):
        hit = [1 - hypergeom.pmf(0, 12, count, k) for count in num_correct]
        assert found[f"r{k}"] == pytest.approx(100 * np.mean(hit))


@hypothesis.given(
    arrays.arrays(float, (9, 3), elements=LEVELS), arrays.arrays(bool, (9, 3)), st.integers(0, 9)
)
def test_labels_against_scikit_learn(scores, correct, seed):
    found = average_precision(scores, correct)
    for column in range(3):
        c, s = correct[:, column], scores[:, column]
        if c.any():
            assert found[column] == pytest.approx(average_precision_score(c, s))
        else:
            assert np.isnan(found[column])
    order = np.random.default_rng(seed).permutation(9)
    np.testing.assert_allclose(average_precision(scores[order], correct[order]), found)
    predicted = scores > 0
    for average in ("micro", "macro"):
        theirs = f1_score(correct, predicted, average=average, zero_division=0)
        assert f1_scores(predicted, correct)[f"{average}_f1"] == pytest.approx(100 * theirs)
    kinds = [("a", "b", "")[i % 3] for i in order]
    by_kind = accuracy_by_kind(correct[:, 0], kinds)
    assert list(by_kind) == ["", "a", "b"]
    for kind, value in by_kind.items():
        rows = np.flatnonzero([k == kind for k in kinds])
        assert value == pytest.approx(100 * accuracy_score(correct[rows, 0], [True] * len(rows)))
