"""Averages of the parameters (EMA): their rule, and who reads them."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_batch
from run_checks import Stopped, assert_same_run, before_metrics_of, stop

import vlmae
from data_pipelines.schema.checks import UserError
from vlmae.cli.run_experiment import run_experiment
from vlmae.config.tree import override
from vlmae.evaluation.evaluate import evaluate_workdir
from vlmae.export.command import export
from vlmae.runs.checkpoint import Checkpoints, load_params
from vlmae.runs.result import read_result
from vlmae.training.step import (
    AveragedState,
    TrainState,
    average_params,
    skip_nonfinite,
    train_step,
)

DECAY = 0.25  # reached in step 3, by (1 + 2) / (10 + 2)


@pytest.fixture
def config(tiny_config):
    return override(tiny_config, {"optim.ema_decay": DECAY})


@pytest.fixture(scope="module")
def averaged(tiny_data_dir, tmp_path_factory) -> Path:
    """The tiny experiment with averages, 8 steps at one go."""
    import tiny_experiment

    workdir = tmp_path_factory.mktemp("averaged")
    changes = {"data.data_dir": str(tiny_data_dir), "optim.ema_decay": DECAY}
    run_experiment(override(tiny_experiment.get_config(), changes), workdir)
    return workdir


def stored(workdir: Path, step: int) -> dict:
    """All arrays of a checkpoint, by the part of the state."""
    with Checkpoints(workdir) as checkpoints:
        state = checkpoints.manager.restore(step)
    return state["state"]


def toy_gradients(params, batch, key):
    return {"w": 0.5 * params["w"]}, {"loss/total": params["w"].sum()}


def test_averages_follow_the_rule():
    """Five steps of plain gradient descent against the recursion in NumPy."""
    tx, batch = optax.sgd(0.1), random_batch(2)
    params = {"w": jnp.array([1.0, -2.0])}
    state = AveragedState(jnp.int32(0), jnp.int32(0), params, tx.init(params), params)
    step = functools.partial(train_step, gradients=toy_gradients, tx=tx)
    step = functools.partial(average_params, step=step, decay=jnp.float32(DECAY))
    weights = mean = np.array([1.0, -2.0])
    for done in range(5):
        state, _ = step(state, batch)
        weights = weights - 0.1 * 0.5 * weights
        decay = min(DECAY, (1 + done) / (10 + done))
        mean = decay * mean + (1 - decay) * weights
        np.testing.assert_allclose(state.params["w"], weights, rtol=1e-6)
        np.testing.assert_allclose(state.ema["w"], mean, rtol=1e-6)
        assert state.evaluated is state.ema


def test_a_skipped_step_leaves_the_averages():
    def broken(params, batch, key):
        return {"w": params["w"] * jnp.nan}, {"loss/total": jnp.nan}

    tx = optax.sgd(0.1)
    params = {"w": jnp.ones(2)}
    state = AveragedState(jnp.int32(0), jnp.int32(0), params, tx.init(params), {"w": jnp.zeros(2)})
    step = functools.partial(train_step, gradients=broken, tx=tx)
    step = functools.partial(average_params, step=step, decay=jnp.float32(DECAY))
    state, _ = skip_nonfinite(state, random_batch(2), step=step)
    np.testing.assert_array_equal(state.ema["w"], np.zeros(2))
    assert state.step == 1


def test_without_averages_the_state_is_what_it_was():
    state = TrainState(0, 0, {"w": 1.0}, ())
    assert state.evaluated is state.params
    assert "ema" not in TrainState.__dataclass_fields__


def test_a_run_with_averages(config, averaged, tmp_path, monkeypatch, capsys):
    """Evaluation, library, export and the next run read the averages, and resuming keeps them."""
    state = stored(averaged, 8)
    means, weights = state["ema"]["match_head"]["kernel"], state["params"]["match_head"]["kernel"]
    assert 0 < np.abs(means - weights).max() < 0.1
    params, _ = load_params(averaged)
    np.testing.assert_array_equal(params["match_head"]["kernel"], means)

    capsys.readouterr()
    again = evaluate_workdir(averaged)["test"]
    assert "step 8 (EMA), split test: written" in capsys.readouterr().out
    metrics = read_result(averaged)["metrics"]
    assert metrics["retrieval/t2v_info_nce"] == pytest.approx(again["retrieval/t2v_info_nce"])
    model = vlmae.load(averaged)
    assert "step 8 (EMA)" in repr(model)
    np.testing.assert_array_equal(model.params["match_head"]["kernel"], means)

    export(averaged, tmp_path / "export")
    assert "step 8 (EMA): written" in capsys.readouterr().out
    exported, _ = load_params(tmp_path / "export")
    np.testing.assert_array_equal(exported["match_head"]["kernel"], means)
    assert "8 (EMA)" in (tmp_path / "export" / "README.md").read_text()

    # The next run starts from the averages, with averages of its own that start there.
    following = {"train.init_from": str(averaged), "train.steps": 1, "optim.learning_rate": 1e-9}
    run_experiment(override(config, following), tmp_path / "next")
    state = stored(tmp_path / "next", 1)
    for name in ("params", "ema"):
        np.testing.assert_allclose(state[name]["match_head"]["kernel"], means, atol=1e-7)
    assert "step 8 (EMA) of" in (tmp_path / "next" / "init.txt").read_text()

    branch = {"train.init_from": str(averaged), "train.init_step": 4, "optim.ema_decay": 0.0}
    with pytest.raises(UserError, match=r"averages included: leave --optim\.ema-decay as it is"):
        run_experiment(override(config, branch), tmp_path / "branch")

    with monkeypatch.context() as patch:
        before_metrics_of(7, stop, patch)
        with pytest.raises(Stopped):
            run_experiment(config, tmp_path / "stopped")
    run_experiment(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", averaged)  # of the averages
    ours, theirs = (stored(folder, 8)["params"] for folder in (tmp_path / "stopped", averaged))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_begun_without_averages_cannot_go_on_with_them(averaged, config, tmp_path):
    shutil.copytree(averaged, tmp_path / "run")
    with pytest.raises(UserError, match=r"optim\.ema_decay: 0\.25 there, 0\.0 here"):
        run_experiment(override(config, {"optim.ema_decay": 0.0}), tmp_path / "run")
