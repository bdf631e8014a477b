import hypothesis
import numpy as np
from hypothesis import strategies as st
from scipy import stats

from data_pipelines.media.sampling import segment_times


def test_evaluation_takes_the_middle_of_each_segment():
    np.testing.assert_allclose(segment_times(8.0, 4), [1, 3, 5, 7])
    np.testing.assert_allclose(segment_times(3.0, 1), [1.5])


def test_training_draws_one_time_in_each_segment():
    rng = np.random.default_rng(0)
    draws = np.array([segment_times(6.0, 3, rng) for _ in range(2000)])
    places = draws / 2 - np.arange(3)  # within the segments
    for place in places.T:
        assert stats.kstest(place, "uniform").pvalue > 0.001
    # One offset for all segments, or one that depends on the last, would show here.
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert stats.spearmanr(places[:, one], places[:, other]).pvalue > 0.001


def test_equal_generators_give_equal_times():
    first, second = (segment_times(5.0, 4, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@hypothesis.given(st.floats(0, 1e5), st.integers(1, 64), st.none() | st.integers(0, 99))
def test_times_ascend_within_the_clip(duration, count, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    times = segment_times(duration, count, rng)
    assert times.shape == (count,)
    assert (np.diff(times) >= 0).all() and 0 <= times[0] and times[-1] <= duration
    edges = np.arange(count + 1) * duration / count
    assert (times >= edges[:-1] * (1 - 1e-12)).all() and (times <= edges[1:] * (1 + 1e-12)).all()
