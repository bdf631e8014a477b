"""Runs of one shape share one compiled step: what differs between them is an input of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment

from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.parallel.sharding import make_mesh
from vlmae.training.step import abstract_batch, make_init, make_step, random_batch, run_values

BASE = override(tiny_experiment.get_config(), {"model.text.vocab_size": 64})
VALUES = {
    "train.steps": 1000,
    "optim.warmup_steps": 100,
    "optim.learning_rate": 0.5,
    "optim.final_ratio": 0.5,
    "optim.weight_decay": 0.0,
    "optim.schedule": "wsd",
    "objectives.vtm": 0.25,
    "seed": 7,
}


def step_of(config: ExperimentConfig) -> Callable:
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return make_step(config, mesh, jax.eval_shape(make_init(config), 0))


@pytest.fixture(scope="module")
def text_of() -> Callable[[ExperimentConfig], str]:
    """The text of a config's program, from which JAX's cache of programs takes its key."""

    def lower(config: ExperimentConfig) -> str:
        state = jax.eval_shape(make_init(config), 0)
        return step_of(config).lower(state, abstract_batch(config), run_values(config)).as_text()

    return lower


def test_values_leave_the_program_as_it_is(text_of):
    assert text_of(override(BASE, VALUES)) == text_of(BASE)


def test_shapes_and_objectives_do_not(text_of):
    """The comparison above can fail."""
    for changes in ({"model.video.mask.ratio": 0.25}, {"objectives.vtm": 0.0}):
        assert text_of(override(BASE, changes)) != text_of(BASE), changes


def test_the_program_reads_the_values():
    """Ten times the rate is ten times the first update; a loss without weight has no gradient."""
    config = override(BASE, {"optim.weight_decay": 0.0, "objectives.mlm": 0.0})
    step, batch = step_of(config), random_batch(abstract_batch(config), 64)
    init = jax.jit(make_init(config))
    before = jax.device_get(init(0).params)

    def update(**changes: float) -> dict:
        values = run_values(override(config, {f"optim.{k}": v for k, v in changes.items()}))
        state, metrics = step(init(0), batch, values)
        moved = jax.tree.map(lambda new, old: new - old, jax.device_get(state.params), before)
        moved.pop("temperature")  # is clamped
        return moved | {"loss": metrics["loss/total"]}

    slow, fast = update(learning_rate=1e-3), update(learning_rate=1e-2)
    assert slow.pop("loss") == fast.pop("loss")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(10 * x, y, atol=1e-6), slow, fast)
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(fast)) > 5e-3
    heavy = run_values(override(config, {"objectives.vtc": 3.0}))
    _, metrics = step(init(0), batch, heavy)
    weights = {"vtc": 3.0, "vtm": 1.0, "mvm": 1.0}
    expected = sum(weight * metrics[f"loss/{name}"] for name, weight in weights.items())
    np.testing.assert_allclose(metrics["loss/total"], expected, rtol=1e-6)
