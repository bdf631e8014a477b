"""The devices' matrix rate, the share of it that a run reaches, and the time that counts for it."""

import types

import jax
import jax.numpy as jnp
import pytest

from vlmae import speed


class Clock:
    """Stands for `time.perf_counter`; `now` is moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=clock))
    return clock


def test_the_best_timing_counts_for_all_devices(monkeypatch):
    timings, seen = iter([0.5, 0.25, 0.125, 0.5, 0.25]), []

    def seconds(product, matrix, in_a_row):
        seen.append((matrix.shape, matrix.dtype))
        return next(timings)

    monkeypatch.setattr(speed, "_seconds", seconds)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices("cpu"))
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    assert speed.measure_matrix_rate("bfloat16") == 3 * 2 * 1024**3 / 0.125
    assert set(seen) == {((1024, 1024), jnp.dtype("bfloat16"))}


def test_products_in_a_row_are_waited_for_once(clock):
    events = []

    class Result:
        def block_until_ready(self) -> None:
            events.append("waited")
            clock.now += 20

    def product(left, right) -> Result:
        assert left is right
        events.append("started")
        return Result()

    assert speed._seconds(product, jnp.zeros(()), 10) == 2
    assert events == ["started"] * 10 + ["waited"]


def test_a_rate_is_measured():
    assert speed.measure_matrix_rate("float32") > 0


def test_the_share_of_the_rate():
    report = {"speed/flops_per_clip": 3e9, "speed/clips_per_sec": 20.0}
    assert speed.matrix_rate_share(report, matrix_rate=1.2e11) == 0.5


def test_meter_reports_means_of_the_steps_that_have_a_metric():
    meter = speed.Meter()
    meter.add({"loss/total": 1.0, "loss/mvm": 4.0}, clips=8)
    meter.add({"loss/total": 3.0}, clips=8)
    report = meter.report()
    assert report["loss/total"] == 2.0 and report["loss/mvm"] == 4.0
    meter.add({"loss/total": 7.0}, clips=8)
    assert meter.report()["loss/total"] == 7.0


def test_meter_tells_waiting_from_pauses(clock):
    meter = speed.Meter()
    with meter.paused():
        clock.now += 7
    with meter.waiting():
        clock.now += 3
    clock.now += 1
    meter.add({}, clips=2)
    report = meter.report()
    assert report["speed/secs_per_step"] == 4 and report["speed/clips_per_sec"] == 0.5
    assert report["speed/data_wait_share"] == 0.75


def test_a_pause_within_a_pause_counts_once(clock):
    meter = speed.Meter()
    for _ in range(2):
        clock.now += 1
        with meter.paused():
            clock.now += 5
            with meter.paused():
                clock.now += 30
            clock.now += 5
    meter.add({}, clips=1)
    assert meter.report()["speed/secs_per_step"] == 2
