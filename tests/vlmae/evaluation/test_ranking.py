"""Rankings in blocks against whole matrices of scores."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from vlmae.evaluation import ranking
from vlmae.evaluation.metrics import best_ranks, rank_metrics
from vlmae.evaluation.ranking import (
    Direction,
    Ranked,
    Right,
    best_temperature,
    equal_ids,
    rank_candidates,
    renumbered,
    rerank,
    top_k,
    with_dual_softmax,
)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def make_direction(queries: int = 60, candidates: int = 37, seed: int = 0) -> Direction:
    """Several queries of one id, several candidates of some."""
    rng = np.random.default_rng(seed)
    ids = np.concatenate([np.arange(30), rng.integers(0, 30, candidates - 30)])
    items = unit(rng, candidates, 8)
    own = rng.integers(0, candidates, queries)
    return Direction(
        items[own] + 0.7 * unit(rng, queries, 8), items, equal_ids(ids[own], ids), ids[own]
    )


def right_of(correct: np.ndarray) -> Right:
    starts = np.concatenate([[0], np.cumsum(correct.sum(axis=1))])
    return Right(starts, np.nonzero(correct)[1], correct.shape[1])


def test_candidates_of_equal_id_are_right():
    rng = np.random.default_rng(0)
    queries, candidates = rng.integers(0, 9, 50), rng.integers(0, 7, 20)
    right, correct = equal_ids(queries, candidates), queries[:, None] == candidates
    rows = np.array([4, 0, 49])
    np.testing.assert_array_equal(right.mask(rows), correct[rows])
    items = rng.integers(0, 20, (50, 3))
    np.testing.assert_array_equal(right.contains(items), np.take_along_axis(correct, items, 1))
    numbers = rng.permutation(np.arange(20) % 6)
    merged = np.zeros((50, 6), bool)
    np.logical_or.at(merged.T, numbers, correct.T)
    np.testing.assert_array_equal(renumbered(right, numbers).mask(np.arange(50)), merged)


@pytest.mark.parametrize("block_pairs", [1, 100, 1 << 22])
def test_blocks_agree_with_the_whole_matrix(block_pairs, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_PAIRS", block_pairs)
    direction = make_direction()
    scores = direction.queries @ direction.candidates.T
    correct = direction.right.mask(np.arange(60))
    ranked = rank_candidates(direction, 5, 0.1)
    np.testing.assert_array_equal(ranked.ranks, best_ranks(scores, correct))
    np.testing.assert_array_equal(ranked.best, np.argsort(-scores, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(ranked.scores, -np.sort(-scores, axis=1)[:, :5], rtol=1e-5)
    of_all = log_softmax(scores / 0.1, axis=1)
    expected = -logsumexp(np.where(correct, of_all, -np.inf), axis=1)
    np.testing.assert_allclose(ranked.info_nce, expected, rtol=1e-4, atol=1e-5)
    assert rank_candidates(direction, 99, 0.1).best.shape == (60, 37)


@pytest.mark.parametrize("levels", [1, 2, 4, 1000])
@pytest.mark.parametrize("k", [1, 5, 19, 20, 25])
def test_top_k_is_a_stable_sort(levels, k):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (50, 20)).astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(top_k(scores, k), expected)


@pytest.mark.parametrize("block_pairs", [100, 1 << 22])
def test_best_temperature_is_that_of_scipy(block_pairs, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_PAIRS", block_pairs)
    direction = make_direction()
    scores = (direction.queries @ direction.candidates.T).astype(float)
    correct = direction.right.mask(np.arange(60))

    def mean(temperature: float) -> float:
        of_all = log_softmax(scores / temperature, axis=1)
        return -logsumexp(np.where(correct, of_all, -np.inf), axis=1).mean()

    expected = minimize_scalar(mean, bounds=(0.01, 1), method="bounded")
    found = best_temperature(direction)
    assert found == pytest.approx(expected.x, rel=1e-2)
    assert rank_candidates(direction, 1, found).info_nce.mean() == pytest.approx(expected.fun)
    constant = direction._replace(queries=np.zeros_like(direction.queries))
    assert best_temperature(constant) == 1


def test_a_sample_of_queries_finds_nearly_the_best_temperature(monkeypatch):
    direction = make_direction(queries=2000)
    best = rank_candidates(direction, 1, best_temperature(direction)).info_nce.mean()
    monkeypatch.setattr(ranking, "FIT_PAIRS", 300 * 37)
    found = rank_candidates(direction, 1, best_temperature(direction)).info_nce.mean()
    assert best <= found < 1.005 * best


def test_a_query_without_right_candidate_is_an_error():
    direction = make_direction()
    correct = direction.right.mask(np.arange(60))
    correct[[7, 59]] = False
    wrong = direction._replace(right=right_of(correct))
    for call in (lambda: rank_candidates(wrong, 5, 1.0), lambda: best_temperature(wrong)):
        with pytest.raises(ValueError, match="2 queries have no correct item, the first is 7"):
            call()


def dual_scores(scores: np.ndarray) -> np.ndarray:
    """Scores of dual softmax, through a direction whose queries are the scores themselves."""
    identity = np.eye(scores.shape[1], dtype=np.float32)
    right = right_of(np.eye(*scores.shape, dtype=bool))
    direction = Direction(scores.astype(np.float32), identity, right, np.arange(len(scores)))
    return with_dual_softmax(direction).scores(np.arange(len(scores)))


@pytest.mark.parametrize("block_pairs", [100, 1 << 22])
def test_dual_softmax_prefers_what_nothing_else_wants(block_pairs, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_PAIRS", block_pairs)
    scores = np.array([[0.5, 0.49], [0.9, 0.1]])  # both queries like item 0 best
    assert scores.argmax(axis=1).tolist() == [0, 0]
    assert dual_scores(scores).argmax(axis=1).tolist() == [1, 0]
    scores = np.random.default_rng(0).normal(size=(60, 30)) / 10
    expected = np.log(softmax(scores / 0.01, axis=0)) + scores / 0.01
    np.testing.assert_allclose(dual_scores(scores), expected, rtol=1e-4, atol=1e-4)


def test_dual_softmax_keeps_the_order_where_scores_are_negative():
    """Cosines far below zero rank as the same ones far above: only differences count."""
    rng = np.random.default_rng(0)
    scores, correct = 0.05 * rng.normal(size=(60, 60)) + 0.2 * np.eye(60), np.eye(60, dtype=bool)
    results = [
        rank_metrics(best_ranks(dual_scores(scores + shift), correct))
        for shift in (-0.6, -0.1, 0.0, 0.6)
    ]
    assert all(result == results[0] for result in results)
    assert results[0]["r1"] >= rank_metrics(best_ranks(scores, correct))["r1"] > 90
    # Of one item, the weights follow the order of the scores, so neither reverses it.
    weighted = dual_scores(scores - 1)
    np.testing.assert_array_equal(weighted.argsort(axis=0), scores.argsort(axis=0))


def reranked(first: np.ndarray, second: np.ndarray, k: int, correct: np.ndarray) -> Ranked:
    """Rerank dense scores, of which all are kept."""
    best = np.argsort(-first, axis=1, kind="stable")
    kept = np.take_along_axis(first, best, axis=1)
    ranked = Ranked(best_ranks(first, correct), best, kept, np.zeros(len(first)))
    return rerank(ranked, np.take_along_axis(second, best[:, :k], axis=1), right_of(correct))


def test_rerank_orders_the_top_by_the_second_score_and_the_rest_by_the_first():
    first = np.array([[0.9, 0.1, 0.8, 0.2, 0.7], [0.1, 0.2, 0.3, 0.4, 0.5]])
    second = np.array([[-9, np.nan, -7, np.nan, -8], [np.nan, np.nan, 5, 7, 6]])
    result = reranked(first, second, 3, np.array([[1, 1, 0, 0, 0], [1, 0, 0, 1, 0]], bool))
    assert result.best.tolist() == [[2, 4, 0, 3, 1], [3, 4, 2, 1, 0]]
    assert result.ranks.tolist() == [3, 1]


@pytest.mark.parametrize("levels", [3, 1000])
def test_rerank_agrees_with_sorting(levels):
    """With many ties and with none, which count against the right candidates."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, levels, (2, 40, 12)).astype(float)
    correct = rng.random((40, 12)) < 0.2
    correct[:, 3] = True
    for k in (1, 5, 12):
        result = reranked(first, second, k, correct)
        for row, (a, b, right) in enumerate(zip(first, second, correct, strict=True)):
            by_first = sorted(range(12), key=lambda j, a=a: -a[j])
            top = sorted(sorted(by_first[:k]), key=lambda j, b=b: -b[j])
            assert result.best[row].tolist() == top + by_first[k:]
            whole = np.where(np.isin(np.arange(12), top), b + 2 * levels, a)
            assert result.ranks[row] == best_ranks(whole[None], right[None])[0]
        assert (np.diff(result.scores, axis=1) <= 0).all()


def test_rerank_keeps_ties_so_that_a_constant_second_score_earns_nothing():
    first, correct = np.tile([0.9, 0.8, 0.7, 0.1], (4, 1)), np.eye(4, dtype=bool)
    assert reranked(first, np.zeros((4, 4)), 3, correct).ranks.tolist() == [3, 3, 3, 4]


def test_rerank_does_not_hide_a_second_score_that_is_nan():
    second = np.array([[np.nan, 1.0, 2.0]])
    with pytest.raises(ValueError, match="1 retrieval scores are NaN"):
        reranked(np.array([[3.0, 2.0, 1.0]]), second, 2, np.eye(1, 3, dtype=bool))
