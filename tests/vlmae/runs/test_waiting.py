"""A long silence gets a line now and then."""

import time

import pytest

from data_pipelines.storage import waiting
from data_pipelines.storage.prepare import prepare
from vlmae.runs import metric_registry


def test_long_work_speaks_and_short_work_does_not(monkeypatch):
    monkeypatch.setattr(waiting, "EVERY_SECS", 0.05)
    said = []
    with waiting.waiting("compiling", said.append):
        time.sleep(0.5)
    assert len(said) > 2 and set(said) <= {"compiling: 0 s", "compiling: 1 s"}
    count = len(said)
    with waiting.waiting("nothing", said.append):
        pass
    time.sleep(0.2)
    assert len(said) == count, "it ends with the work"


def test_it_speaks_less_often_after_a_minute(monkeypatch):
    monkeypatch.setattr(waiting, "EVERY_SECS", 0.02)
    monkeypatch.setattr(waiting, "SLOW_SECS", 0.0)
    said = []
    with waiting.waiting("compiling", said.append):
        time.sleep(0.3)
    assert len(said) == 1


def test_preparing_speaks(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(waiting, "EVERY_SECS", 0.01)
    prepare("shapes", tmp_path, num_train=9, num_val=1, num_test=1, frame_size=32)
    assert "shapes: reading and checking media: 0 s" in capfd.readouterr().err


def test_errors_pass_and_end_it():
    with pytest.raises(ValueError), waiting.waiting("compiling"):
        raise ValueError


def test_the_losses_stand_beside_their_accuracies_and_those_of_a_guess():
    metrics = {"loss/total": 2.0, "loss/vtm": 0.6, "vtm/accuracy": 2 / 3, "loss/mvm": 0.25}
    shown = metric_registry.losses_and_accuracies(metrics, {"vtm": 2 / 3})
    assert shown == "vtm 0.600 (right 67 %, a guess 67)  mvm 0.250"


def test_the_headline_has_four_figures_beside_chance():
    metrics = {f"retrieval/t2v_{key}": 10.0 for key in ("r1", "r5", "r10", "mrr", "median_rank")}
    metrics |= {f"retrieval/t2v_chance_{key}": 2.0 for key in ("r1", "r5", "r10", "mrr")}
    shown = metric_registry.headline(metrics)
    assert shown.count("10.0 % (a guess: 2.0)") == 4 and shown.startswith("text to video R@1 10.0")
    assert metric_registry.headline({"speed/secs_per_step": 1.0}) == "evaluated"
