"""Metrics: each step stands once in the file, and means are means."""

import json
import time

import pytest

from vlmae.metric_writer import MetricWriter, drop_later_lines, read_metrics
from vlmae.speed import Meter


def test_later_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss/total": 0.5}) for step in (10, 20, 30)]
    path.write_text("\n".join(lines) + "\n" + '{"step": 2')
    drop_later_lines(path, 20)
    assert [line["step"] for line in read_metrics(path.parent)] == [10, 20]


def test_a_continued_run_writes_each_step_once(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = MetricWriter(tmp_path, start)
        for step in steps:
            writer.write(step, {"loss/total": float(step)})
        writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_meter_reports_means_of_the_steps_that_have_a_metric():
    meter = Meter()
    meter.add({"loss/total": 1.0, "loss/mvm": 4.0}, clips=8)
    meter.add({"loss/total": 3.0}, clips=8)
    report = meter.report()
    assert report["loss/total"] == 2.0 and report["loss/mvm"] == 4.0
    meter.add({"loss/total": 7.0}, clips=8)
    assert meter.report()["loss/total"] == 7.0


def test_meter_tells_waiting_from_pauses():
    meter = Meter()
    with meter.paused():
        time.sleep(0.2)
    with meter.waiting():
        time.sleep(0.05)
    meter.add({}, clips=1)
    report = meter.report()
    assert report["speed/secs_per_step"] == pytest.approx(0.05, abs=0.04)
    assert report["speed/data_wait_share"] > 0.8
