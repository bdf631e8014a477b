"""The log of a loop: rates and times, what it counts, from where, and when it stops a run."""

import types

import jax
import jax.numpy as jnp
import pytest
from helpers import SMALL

from vlmae.config.tree import override
from vlmae.runs.metric_writer import NullWriter
from vlmae.training import train_log
from vlmae.training.train_log import NonFiniteLoss, TooManyBadClips, TrainLog


class Clock:
    """Stands for `time.perf_counter`; `now` is moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(train_log, "time", types.SimpleNamespace(perf_counter=clock))
    return clock


def test_the_best_timing_counts_for_all_devices(monkeypatch):
    timings, seen = iter([0.5, 0.25, 0.125, 0.5, 0.25]), []

    def seconds(product, matrix, in_a_row):
        seen.append((matrix.shape, matrix.dtype))
        return next(timings)

    monkeypatch.setattr(train_log, "_seconds", seconds)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices("cpu"))
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    assert train_log.measure_matrix_rate("bfloat16") == 3 * 2 * 1024**3 / 0.125
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

    assert train_log._seconds(product, jnp.zeros(()), 10) == 2
    assert events == ["started"] * 10 + ["waited"]


def test_a_rate_is_measured():
    assert train_log.measure_matrix_rate("float32") > 0


def test_the_share_of_the_rate():
    report = {"speed/flops_per_clip": 3e9, "speed/clips_per_sec": 20.0}
    assert train_log.matrix_rate_share(report, matrix_rate=1.2e11) == 0.5


def test_meter_reports_means_of_the_steps_that_have_a_metric():
    meter = train_log.Meter()
    meter.add({"loss/total": 1.0, "loss/mvm": 4.0}, clips=8)
    meter.add({"loss/total": 3.0}, clips=8)
    report = meter.report()
    assert report["loss/total"] == 2.0 and report["loss/mvm"] == 4.0
    meter.add({"loss/total": 7.0}, clips=8)
    assert meter.report()["loss/total"] == 7.0


def test_meter_tells_waiting_from_pauses(clock):
    meter = train_log.Meter()
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
    meter = train_log.Meter()
    for _ in range(2):
        clock.now += 1
        with meter.paused():
            clock.now += 5
            with meter.paused():
                clock.now += 30
            clock.now += 5
    meter.add({}, clips=1)
    assert meter.report()["speed/secs_per_step"] == 2


ROWS = 500
CONFIG = override(SMALL, {"data.batch_size": ROWS, "data.max_bad_ratio": 0.1, "train.steps": 2000})


def log_after(start: int) -> TrainLog:
    """A log that continues after this step."""
    params = {"w": {"kernel": jnp.ones((2, 2))}}
    return TrainLog(CONFIG, start, params, 1.0, NullWriter(), NullWriter())


def step_with(bad_ratio: float, loss: float = 1.0) -> dict:
    return {"data/bad_ratio": jnp.asarray(bad_ratio), "loss/total": jnp.asarray(loss)}


@pytest.mark.parametrize("start", [0, 1000])
def test_bad_clips_are_a_share_of_those_that_this_run_has_seen(start):
    """Of a run that goes on after 1000 steps too: earlier clips are not counted as good ones."""
    log = log_after(start)
    log.add(start + 1, step_with(0.2), read_now=True)  # 500 clips are too few to judge
    with pytest.raises(TooManyBadClips, match="200 of 1000 clips"):
        log.add(start + 2, step_with(0.2), read_now=True)
    log = log_after(start)
    for step in (1, 2, 3):
        log.add(start + step, step_with(0.1), read_now=True)
    assert log.bad_clips == 150


def test_metrics_are_read_one_step_late_unless_they_are_due():
    log = log_after(0)
    log.add(1, step_with(0.0, loss=float("nan")), read_now=False)
    with pytest.raises(NonFiniteLoss, match="step 1: not finite: loss/total=nan"):
        log.add(2, step_with(0.0), read_now=False)
    with pytest.raises(NonFiniteLoss, match="step 1"):
        log_after(0).add(1, step_with(0.0, loss=float("inf")), read_now=True)
