"""Steps that are not finite: skipped, then undone, then the end of the run; and saving by time."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, random_batch

from vlmae.config.tree import override
from vlmae.runs.checkpoint import Checkpoints
from vlmae.runs.metric_writer import read_metrics
from vlmae.training import step as step_module
from vlmae.training.step import TrainState, make_init, skip_nonfinite
from vlmae.training.train import train
from vlmae.training.train_log import NonFiniteLoss

BAD = -1  # media id of a batch whose loss and gradient are not finite
CONFIG = override(
    SMALL,
    {
        **{f"objectives.{name}": 0.0 for name in ("vtm", "mlm", "mvm")},
        "train.log_every_steps": 1,
        "train.keep_checkpoints": 10,
    },
)


@pytest.fixture(autouse=True)
def _bad_batches(monkeypatch):
    """Make gradient and loss of a batch NaN where its first media id is BAD."""
    real = step_module.make_gradients

    def make(*args, **options):
        gradients = real(*args, **options)

        def poisoned(params, batch, key):
            grads, metrics = gradients(params, batch, key)
            factor = jnp.where(batch.media_ids[0] == BAD, jnp.nan, 1.0)
            metrics = metrics | {"loss/total": factor * metrics["loss/total"]}
            return jax.tree.map(lambda x: factor * x, grads), metrics

        return poisoned

    monkeypatch.setattr(step_module, "make_gradients", make)


def run(tmp_path, bad: set[int], **changes) -> list[dict]:
    """Train on batches of which those of some steps are bad; returns the metrics."""

    def batches(data, start: int, part: int, parts: int) -> Iterator:
        for step in range(start + 1, 100):
            batch = jax.device_get(random_batch(6, seed=step))
            ids = np.full(6, BAD, np.int32) if step in bad else batch.media_ids
            yield batch._replace(media_ids=ids)

    config = override(CONFIG, {f"train.{name}": value for name, value in changes.items()})
    train(config, tmp_path, batches, lambda *_: {})
    return [line for line in read_metrics(tmp_path) if "speed/secs_per_step" in line]


def saved(tmp_path, step: int) -> TrainState:
    with Checkpoints(tmp_path) as checkpoints:
        shapes = jax.eval_shape(make_init(CONFIG), 0)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
        )
        return checkpoints.restore(step, shapes)


def test_the_run_stops_as_ever(tmp_path):
    with pytest.raises(NonFiniteLoss, match="step 3: not finite: loss/total=nan"):
        run(tmp_path, {3}, steps=4, save_every_steps=2)


@pytest.mark.timeout(300)
def test_a_bad_step_is_skipped_and_counted(tmp_path):
    lines = run(tmp_path, {2, 4, 5}, steps=6, save_every_steps=1, max_skipped_steps=2)
    assert [line["optim/skipped_ratio"] for line in lines] == [0, 1, 0, 1, 1, 0]
    assert ["loss/total" in line for line in lines] == [True, False, True, False, False, True]
    states = {step: saved(tmp_path, step) for step in (1, 2, 3)}
    jax.tree.map(np.testing.assert_array_equal, states[1].params, states[2].params)
    moved = jax.tree.map(lambda a, b: np.any(a != b), states[2].params, states[3].params)
    assert any(jax.tree.leaves(moved))


@pytest.mark.timeout(300)
def test_too_many_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(NonFiniteLoss, match="step 4"):
        run(tmp_path, {2, 3, 4}, steps=6, save_every_steps=1, max_skipped_steps=2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [1, 2, 3]


@pytest.mark.timeout(300)
def test_the_run_goes_back_and_past_the_batch(tmp_path, capsys):
    """Parameters and moments of step 2 go on as those of step 4; a second time is one too many."""
    options = {"steps": 6, "save_every_steps": 2, "max_rollbacks": 1}
    lines = run(tmp_path / "once", {4}, **options)
    assert [line["step"] for line in lines] == [1, 2, 3, 5, 6]
    assert "step 4: not finite" in (out := capsys.readouterr().out)
    assert "going back to the parameters of step 2" in out
    before, after = saved(tmp_path / "once", 2), saved(tmp_path / "once", 4)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert (int(before.step), int(after.step)) == (2, 4)
    for old, new in zip(*map(jax.tree.leaves, (before.opt_state, after.opt_state)), strict=True):
        expected = old + 2 if jnp.issubdtype(old.dtype, jnp.integer) else old
        np.testing.assert_array_equal(new, expected)
    with pytest.raises(NonFiniteLoss, match="step 5"):
        run(tmp_path / "twice", {4, 5}, **options)
    with pytest.raises(NonFiniteLoss, match="step 1"):  # there is nothing to go back to
        run(tmp_path / "at once", {1}, **options)


@pytest.mark.timeout(300)
def test_one_that_is_not_skipped_any_more_is_gone_back_from(tmp_path):
    bad = {"max_skipped_steps": 1, "max_rollbacks": 1}
    lines = run(tmp_path, {3, 4}, steps=6, save_every_steps=2, **bad)
    assert [line["step"] for line in lines] == [1, 2, 3, 5, 6]


def test_a_skipped_step_keeps_all_but_counts():
    """Also where the parameters alone are not finite, and where only the gradient is."""
    old = TrainState(jnp.int32(0), jnp.int32(4), {"w": jnp.ones(2)}, (jnp.int32(4), jnp.zeros(2)))
    bad = jnp.array([1.0, jnp.inf])
    good = {"loss/total": jnp.float32(1.0), "optim/grad_norm": jnp.float32(1.0)}

    def to(params, **metrics):
        new = TrainState(old.seed, old.step + 1, {"w": params}, (jnp.int32(5), jnp.full(2, 7.0)))
        return skip_nonfinite(old, random_batch(2), step=lambda *_: (new, good | metrics))

    for params, metrics in ((bad, {}), (jnp.zeros(2), {"optim/grad_norm": jnp.float32(jnp.inf)})):
        new, report = to(params, **metrics)
        assert report["optim/skipped_ratio"] == 1 and int(new.step) == 5
        np.testing.assert_array_equal(new.params["w"], old.params["w"])
        assert int(new.opt_state[0]) == 5 and not new.opt_state[1].any()
    new, report = to(jnp.zeros(2))
    assert report["optim/skipped_ratio"] == 0
    assert not new.params["w"].any() and (new.opt_state[1] == 7).all()


def test_saving_by_minutes(tmp_path):
    run(tmp_path / "often", set(), steps=4, save_every_steps=100, save_every_minutes=1e-9)
    run(tmp_path / "late", set(), steps=4, save_every_steps=100, save_every_minutes=60.0)
    for name, steps in (("often", [1, 2, 3, 4]), ("late", [4])):
        with Checkpoints(tmp_path / name, keep=None) as checkpoints:
            assert checkpoints.all_steps() == steps
