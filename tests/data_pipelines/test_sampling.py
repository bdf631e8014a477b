import numpy as np

from data_pipelines.sampling import segment_times


def test_evaluation_takes_the_middle_of_each_segment():
    np.testing.assert_allclose(segment_times(8.0, 4), [1, 3, 5, 7])
    np.testing.assert_allclose(segment_times(3.0, 1), [1.5])


def test_training_draws_one_time_in_each_segment():
    rng = np.random.default_rng(0)
    draws = np.array([segment_times(6.0, 3, rng) for _ in range(500)])
    segments = np.arange(3) * 2.0
    assert (draws >= segments).all() and (draws < segments + 2).all()
    np.testing.assert_allclose(draws.mean(axis=0), segments + 1, atol=0.1)
    assert draws.std(axis=0).min() > 0.5


def test_equal_generators_give_equal_times():
    first, second = (segment_times(5.0, 4, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
