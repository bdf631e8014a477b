"""The best checkpoint: which it is, that it is kept, and when a run stops."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from run_checks import history

from data_pipelines.schema.checks import MissingError, UserError
from vlmae.config.experiment import TrainConfig
from vlmae.runs.best import (
    BEST,
    BestKeeper,
    BestRecord,
    best_step,
    check_metric,
    load_chosen,
    result_step,
)
from vlmae.runs.checkpoint import Checkpoints, load_params
from vlmae.runs.result import read_result

METRIC = "retrieval/t2v_r1"


def record(*values: float | None, metric: str = METRIC) -> BestRecord:
    steps = tuple(10 * (i + 1) for i in range(len(values)))
    return BestRecord(metric, steps, values)


@pytest.mark.parametrize(
    ("found", "best", "waited"),
    [
        (record(), None, 0),
        (record(1.0, 3.0, 2.0), 20, 1),
        (record(1.0, 3.0, 3.0, 3.0), 20, 2),  # no better is not better
        (record(3.0, 1.0, 2.0, metric="retrieval/t2v_median_rank"), 20, 1),
        (record(None, 1.0), 20, 0),
        (record(None), None, 1),
    ],
)
def test_the_best_step(found, best, waited):
    assert (found.best_step(), found.waited()) == (best, waited)


def test_only_checkpoints_that_are_there_count():
    assert record(1.0, 3.0, 2.0).best_step(among=[10, 30]) == 30
    assert record(1.0, 3.0).best_step(among=[]) is None


def test_a_run_that_goes_back_evaluates_anew():
    found = record(1.0, 3.0, 2.0)
    assert found.up_to(20) == record(1.0, 3.0)
    assert found.added(20, 0.5) == record(1.0, 0.5)


def state(step: int) -> dict:
    return {"params": {"w": np.full(3, float(step), np.float32)}}


def keep(workdir: Path, values: dict[int, float], start: int = 0, patience: int = 0) -> list[int]:
    """Saves each step as a run does; returns the checkpoints that are left."""
    with Checkpoints(workdir, keep=1) as checkpoints:
        best = BestKeeper(METRIC, patience, workdir, checkpoints)
        best.go_on_from(start)
        for step, value in values.items():
            best.add(step, {METRIC: value}, write=True)
            checkpoints.save(step, state(step))
        checkpoints.manager.wait_until_finished()
        return checkpoints.all_steps()


def test_the_best_checkpoint_is_not_deleted(tmp_path):
    assert keep(tmp_path, {1: 5.0, 2: 9.0, 3: 4.0, 4: 3.0}) == [2, 4]
    params, step = load_chosen(tmp_path, "best")
    assert step == 2 and params["w"][0] == 2
    assert load_params(tmp_path)[1] == 4 and load_chosen(tmp_path, "4")[1] == 4
    assert keep(tmp_path, {5: 1.0, 6: 10.0}, start=4) == [6], "a run that goes on"
    assert best_step(tmp_path) == 6


def test_a_record_without_its_checkpoint(tmp_path):
    """Killed after the record was written and before the checkpoint was whole."""
    keep(tmp_path, {1: 5.0, 2: 4.0})
    found = json.loads((tmp_path / BEST).read_text())
    found = {**found, "steps": [*found["steps"], 3], "values": [*found["values"], 8.0]}
    (tmp_path / BEST).write_text(json.dumps(found))
    assert best_step(tmp_path) == 1
    assert keep(tmp_path, {3: 1.0}, start=2) == [1, 3], "the run did step 3 again"


def test_the_result_is_of_the_last_step_where_none_is_best(tmp_path):
    none, some = tmp_path / "none", tmp_path / "some"
    keep(none, {10: float("nan"), 20: float("nan")})
    assert result_step(none, METRIC, 20) == result_step(none, "", 20) == 20
    keep(some, {10: 2.0, 20: float("nan")})
    assert result_step(some, METRIC, 20) == 10


def test_patience(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        best, never = (BestKeeper(METRIC, n, tmp_path, checkpoints) for n in (2, 0))
        for step, value in enumerate([1.0, 3.0, 2.0], 1):
            best.add(step, {METRIC: value}, write=False)
            never.add(step, {METRIC: value}, write=False)
            assert not best.stops()
        best.add(4, {METRIC: 3.0}, write=False)
        never.add(4, {METRIC: 3.0}, write=False)
        assert best.stops() and not never.stops()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="--patience=1 needs --best-metric"):
        TrainConfig(patience=1)
    with pytest.raises(UserError, match="needs --eval-every-steps or --eval-every-epochs"):
        TrainConfig(best_metric=METRIC)
    with pytest.raises(UserError, match="must begin with retrieval/"):
        check_metric("labels/map", ["retrieval"])
    with pytest.raises(UserError, match="neither high nor low"):
        check_metric("retrieval/num_clips", ["retrieval"])
    with pytest.raises(UserError, match="is no metric"):
        check_metric("retrieval/t2v_r2", ["retrieval"])
    check_metric("", [])
    with pytest.raises(MissingError, match="trained without --train"):
        load_chosen(tmp_path, "best")
    with pytest.raises(UserError, match="--checkpoint beste: must be newest, best or the number"):
        load_chosen(tmp_path, "beste")
    keep(tmp_path, {1: 5.0})
    with pytest.raises(MissingError, match=r"no checkpoint of step 7, but of \[1\]"):
        load_chosen(tmp_path, "7")
    with Checkpoints(tmp_path) as checkpoints:
        best = BestKeeper(METRIC, 0, tmp_path, checkpoints)
        with pytest.raises(UserError, match="the evaluation has labels/map"):
            best.add(1, {"labels/map": 1.0}, write=True)


def test_a_run_stops_early_and_reports_its_best_step(run_tiny, tmp_path, monkeypatch):
    """With a rate so high that no evaluation betters the first; and the same command again."""
    flags = ["--objectives.vtm", "0", "--objectives.mlm", "0", "--objectives.mvm", "0"]
    flags += ["--train.steps", "8", "--train.eval-every-steps", "1", "--train.patience", "2"]
    flags += ["--train.best-metric", "retrieval/t2v_info_nce", "--train.keep-checkpoints", "1"]
    values = iter([3.0, 1.0, 2.0, 2.0, 1.5, 1.5])
    import vlmae.cli.run_experiment as module

    def evaluate(config, params, *_):
        return {"retrieval/t2v_info_nce": next(values), "sum": float(checksum(params))}

    def checksum(params):
        return sum(np.abs(np.asarray(x)).sum() for x in jax.tree.leaves(params))

    monkeypatch.setattr(module, "evaluate", evaluate)
    code, err, workdir = run_tiny(*flags)
    assert code == 0, err
    found = json.loads((workdir / BEST).read_text())
    assert found["steps"] == [1, 2, 3, 4] and found["values"] == [3.0, 1.0, 2.0, 2.0]
    assert max(line["step"] for line in history(workdir)) == 4
    params, step = load_chosen(workdir, "best")
    result = read_result(workdir)
    assert result["step"] == step == 2
    np.testing.assert_allclose(result["metrics"]["sum"], checksum(params), rtol=1e-6)
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.all_steps() == [2, 4]
    code, err, _ = run_tiny(*flags)
    assert code == 0, err
    assert read_result(workdir)["step"] == 2, "no step is done again"
