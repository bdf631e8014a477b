"""The devices' matrix rate, and the share of it that a run reaches."""

import jax
import pytest

from vlmae import speed


def test_the_best_timing_counts_for_all_devices(monkeypatch):
    timings = iter([0.5, 0.25, 0.125, 0.5, 0.25])
    monkeypatch.setattr(speed, "_seconds", lambda *_: next(timings))
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices("cpu"))
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    assert speed.measure_matrix_rate("float32") == 3 * 2 * 1024**3 / 0.125


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rate_is_measured(dtype):
    assert 1e8 < speed.measure_matrix_rate(dtype) / jax.device_count() < 1e16


def test_the_share_of_the_rate():
    report = {"speed/flops_per_clip": 3e9, "speed/clips_per_sec": 20.0}
    assert speed.matrix_rate_share(report, matrix_rate=1.2e11) == 0.5
