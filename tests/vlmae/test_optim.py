"""Learning-rate schedules, weight decay, clipping and accumulated gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_batch

from data_pipelines.records import Batch
from vlmae.config import OptimConfig
from vlmae.optim import decay_mask, make_optimizer, make_schedule
from vlmae.train import accumulated

# --- the schedule


@pytest.mark.parametrize(
    ("kind", "halfway"),
    [("cosine", 0.1 + 0.9 * 0.5), ("linear", 0.55)],
)
def test_schedule(kind, halfway):
    config = OptimConfig(learning_rate=2.0, schedule=kind, warmup_steps=10, final_ratio=0.1)
    schedule = make_schedule(config, steps=110)
    rates = {step: float(schedule(step)) for step in (0, 5, 10, 60, 110, 200)}
    expected = {0: 0.0, 5: 1.0, 10: 2.0, 60: 2 * halfway, 110: 0.2, 200: 0.2}
    assert rates == pytest.approx(expected)


def test_the_cosine_is_above_the_line_early_and_below_it_late():
    config = OptimConfig(learning_rate=1.0, final_ratio=0.0)
    schedule = make_schedule(config, steps=100)
    assert float(schedule(25)) == pytest.approx(0.5 + np.cos(np.pi / 4) / 2)
    assert float(schedule(75)) == pytest.approx(0.5 - np.cos(np.pi / 4) / 2)


def test_without_warmup_the_first_rate_is_the_peak():
    schedule = make_schedule(OptimConfig(learning_rate=2.0, final_ratio=0.5), steps=10)
    assert float(schedule(0)) == pytest.approx(2.0)
    assert float(schedule(10)) == pytest.approx(1.0)


# --- weight decay and clipping

PARAMS = {
    "block": {
        "mlp": {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
        "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
    },
    "embeddings": {"word": {"embedding": jnp.ones((5, 3))}},
    "mask_token": jnp.ones(3),
    "temperature": jnp.ones(()),
}


def test_only_matrices_decay():
    flags = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(decay_mask(PARAMS))}
    assert {name for name, decays in flags.items() if decays} == {
        "['block']['mlp']['up']['kernel']",
        "['embeddings']['word']['embedding']",
    }


def test_the_optimizer_applies_weight_decay_by_the_mask():
    tx = make_optimizer(OptimConfig(learning_rate=0.5, weight_decay=0.2), steps=10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda decays: -0.5 * 0.2 * decays, decay_mask(PARAMS))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y), updates, expected)


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, 5.0), (2.0, 2.0), (9.0, 5.0)])
def test_gradients_are_clipped_to_the_configured_norm(clip_norm, expected):
    tx = make_optimizer(OptimConfig(clip_norm=clip_norm, b1=0.9), steps=10)
    params = {"a": {"kernel": jnp.ones((1, 1))}, "bias": jnp.ones(1)}
    gradient = {"a": {"kernel": jnp.full((1, 1), 3.0)}, "bias": jnp.full(1, 4.0)}
    _, state = tx.update(gradient, tx.init(params), params)
    seen = optax.tree.norm(optax.tree.get(state, "mu")) / (1 - 0.9)
    np.testing.assert_allclose(seen, expected, rtol=1e-5)


# --- accumulated gradients


def toy_gradients(params: dict, batch: Batch, key) -> tuple[dict, dict]:
    """A gradient that depends on every pixel, on the order of rows and on the key."""
    order = jnp.arange(1.0, 1 + len(batch.valid))
    pixels = (batch.video.mean(axis=(1, 2, 3, 4)) * order).mean()
    return {"w": params["w"] * pixels + jax.random.normal(key)}, {"loss": pixels}


def test_accumulated_gradients_are_the_mean_over_the_parts():
    batch = jax.tree.map(jnp.asarray, random_batch(6))
    params, key = {"w": jnp.array([1.0, 2.0])}, jax.random.key(3)
    results = []
    for part, part_key in enumerate(jax.random.split(key, 3)):
        rows = jax.tree.map(lambda x, part=part: x[part::3], batch)
        results.append(toy_gradients(params, rows, part_key))
    expected = jax.tree.map(lambda *parts: sum(parts) / 3, *results)
    actual = jax.jit(accumulated(toy_gradients, 3))(params, batch, key)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), actual, expected)


def test_one_part_is_the_plain_gradient():
    assert accumulated(toy_gradients, 1) is toy_gradients
