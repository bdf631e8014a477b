"""Learning-rate schedules, weight decay and clipping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SMALL, init_params, random_batch, small_model
from jaxtyping import PyTree

from vlmae.config.experiment import OptimConfig
from vlmae.config.model import AdapterConfig, ModelConfig, VideoEncoderConfig
from vlmae.config.tree import override
from vlmae.models.video_language import build_model, clamp_temperature
from vlmae.ops.losses import contrastive_loss
from vlmae.parallel.sharding import path_name
from vlmae.training.optim import (
    OptimValues,
    decay_mask,
    global_norm,
    learning_rate,
    make_optimizer,
    optim_values,
    rate_factor,
)
from vlmae.training.step import TrainState, train_step

# --- the schedule


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    return functools.partial(learning_rate, optim_values(config, steps))


def adamw(steps: int, model: ModelConfig | None = None, **fields) -> optax.GradientTransformation:
    config = OptimConfig(**fields)
    return make_optimizer(config, optim_values(config, steps), model)


@pytest.mark.parametrize(
    ("kind", "halfway"),
    [("cosine", 0.1 + 0.9 * 0.5), ("linear", 0.55)],
)
def test_schedule(kind, halfway):
    config = OptimConfig(learning_rate=2.0, schedule=kind, warmup_steps=10, final_ratio=0.1)
    schedule = make_schedule(config, steps=111)
    rates = {step: float(schedule(step)) for step in (0, 5, 10, 60, 110, 200)}
    expected = {0: 0.0, 5: 1.0, 10: 2.0, 60: 2 * halfway, 110: 0.2, 200: 0.2}
    assert rates == pytest.approx(expected)


def test_the_cosine_is_above_the_line_early_and_below_it_late():
    config = OptimConfig(learning_rate=1.0, final_ratio=0.0)
    schedule = make_schedule(config, steps=101)
    assert float(schedule(25)) == pytest.approx(0.5 + np.cos(np.pi / 4) / 2)
    assert float(schedule(75)) == pytest.approx(0.5 - np.cos(np.pi / 4) / 2)


def test_without_warmup_the_first_rate_is_the_peak():
    schedule = make_schedule(OptimConfig(learning_rate=2.0, final_ratio=0.5), steps=10)
    assert float(schedule(0)) == pytest.approx(2.0)
    assert float(schedule(9)) == pytest.approx(1.0), "of the last update"


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (10, 4), (10, 8), (2, 0)])
def test_the_last_update_has_the_final_ratio(kind, steps, warmup):
    config = OptimConfig(1e-3, schedule=kind, warmup_steps=warmup, final_ratio=0.01)
    rate = make_schedule(config, steps)
    assert float(rate(warmup)) == pytest.approx(1e-3)
    assert float(rate(steps - 1)) == pytest.approx(1e-5)


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


def test_the_cosine_is_not_computed_for_every_array():
    """XLA copies what is one number into whatever reads it, unless it comes from a branch."""
    params = {str(i): PARAMS for i in range(3)}
    config = OptimConfig(warmup_steps=2)
    values = optim_values(config, 10)

    def run(values: OptimValues, *state: PyTree) -> PyTree:
        return make_optimizer(config, values).update(*state)

    state = make_optimizer(config, values).init(params)
    update = jax.jit(run).lower(values, params, state, params)
    assert update.compile().as_text().count(" cosine(") == 2, "for what decays and for the rest"


def test_only_matrices_decay():
    flags = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(decay_mask(PARAMS))}
    assert {name for name, decays in flags.items() if decays} == {
        "['block']['mlp']['up']['kernel']",
        "['embeddings']['word']['embedding']",
    }


def test_the_optimizer_applies_weight_decay_by_the_mask():
    tx = adamw(10, learning_rate=0.5, weight_decay=0.2)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda decays: -0.5 * 0.2 * decays, decay_mask(PARAMS))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y), updates, expected)


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, 5.0), (2.0, 2.0), (9.0, 5.0)])
def test_gradients_are_clipped_to_the_configured_norm(clip_norm, expected):
    tx = adamw(10, clip_norm=clip_norm, b1=0.9)
    params = {"a": {"kernel": jnp.ones((1, 1))}, "bias": jnp.ones(1)}
    gradient = {"a": {"kernel": jnp.full((1, 1), 3.0)}, "bias": jnp.full(1, 4.0)}
    _, state = tx.update(gradient, tx.init(params), params)
    means = [mean for _, mean in optax.tree.get_all_with_path(state, "mu")]
    np.testing.assert_allclose(optax.tree.norm(means) / (1 - 0.9), expected, rtol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_joined_arrays_are_updated_as_one_by_one(frozen):
    """Like AdamW on every array by itself; frozen ones stay as they are."""
    model = ModelConfig(video=VideoEncoderConfig(adapter=AdapterConfig(frozen_blocks=frozen)))
    config = OptimConfig(learning_rate=0.1, weight_decay=0.3)
    params = {"video_encoder": {"block_0": PARAMS["block"]}, **PARAMS}
    plain = optax.adamw(
        make_schedule(config, 10), config.b1, config.b2, weight_decay=0.3, mask=decay_mask
    )
    tx = make_optimizer(config, optim_values(config, 10), model)
    keys = jax.random.split(jax.random.key(0), 3)
    ours, theirs, states = params, params, [tx.init(params), plain.init(params)]
    for key in keys:
        gradient = jax.tree.map(lambda x, key=key: jax.random.normal(key, x.shape), params)
        updates, states[0] = tx.update(gradient, states[0], ours)
        ours = optax.apply_updates(ours, updates)
        updates, states[1] = plain.update(gradient, states[1], theirs)
        theirs = optax.apply_updates(theirs, updates)
    if frozen:
        theirs["video_encoder"] = params["video_encoder"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours, theirs)


# --- layer-wise decay of the rate

DEEP = override(
    SMALL,
    {
        "model.video.depth": 2,
        "model.video.positions": "learned",
        "model.video.layout.extra_tokens": 1,
        "model.video.layout.input_norm": True,
        "model.video.time_frames": 2,
        "model.video.time_depth": 1,
        "model.text.depth": 3,
        "optim.weight_decay": 0.3,
        "optim.layer_decay": 0.5,
    },
)
LEVELS = {  # beginnings of names -> levels below the full rate
    "video_encoder": {"positions": 3, "cls": 3, "extra": 3, "patch_embed/": 3, "input_norm/": 3}
    | {"block_0/": 2, "block_1/": 1, "norm/": 0, "temporal/": 0},
    "text_encoder": {"embeddings/": 4, "block_0/": 3, "block_1/": 2, "block_2/": 1, "adapters/": 0},
}


def level_of(name: str) -> int:
    part, _, rest = name.partition("/")
    found = [level for start, level in LEVELS.get(part, {"": 0}).items() if rest.startswith(start)]
    assert len(found) == 1, name
    return found[0]


@pytest.mark.parametrize("frozen", [0, 1])
def test_rates_decay_from_the_last_block_to_the_embeddings(frozen):
    """Three updates of every parameter of a model, weight decay included, against one without."""
    config = override(DEEP, {"model.text.adapter.frozen_blocks": frozen})
    params = jax.tree.map(
        lambda x: jnp.ones(x.shape),
        jax.eval_shape(lambda: init_params(build_model(config), random_batch(2))),
    )
    values = optim_values(config.optim, 10)
    plain = override(config, {"optim.layer_decay": 1.0})
    both = []
    for optim in (config.optim, plain.optim):
        tx = make_optimizer(optim, values, config.model)
        state, moved = tx.init(params), []
        for key in jax.random.split(jax.random.key(0), 3):
            grads = jax.tree.map(lambda x, key=key: jax.random.normal(key, x.shape), params)
            updates, state = tx.update(grads, state, params)
            moved.append(updates)
        both.append(moved)
    compared = set()
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(both[0]), jax.tree.leaves(both[1]), strict=True
    ):
        name = path_name(path[1:])  # without the number of the update
        compared.add(level_of(name))
        np.testing.assert_allclose(ours, theirs * 0.5 ** level_of(name), rtol=1e-6, err_msg=name)
        is_frozen = frozen and name.startswith(("text_encoder/embeddings", "text_encoder/block_0"))
        assert bool(jnp.any(ours)) == (not is_frozen), name
    assert compared == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("video_encoder/relative_bias/block_1/table", 0.5),
        ("video_encoder/relative_bias/shared", 1.0),  # as in BEiT
        ("video_encoder/adapters/block_0/up/kernel", 1.0),
        ("fusion/block_0/mlp/up/kernel", 1.0),
        ("classifier/hidden/kernel", 1.0),
    ],
)
def test_rates_of_parts_that_other_models_have(name, factor):
    assert rate_factor(name, DEEP.model, 0.5) == factor


# --- the temperature


def test_a_temperature_at_or_outside_its_bounds_comes_back():
    """A thousand steps push it to its lower bound, with momentum; then hard pairs need it back.

    From a value within the bounds, below and above them.
    """
    e = jax.random.normal(jax.random.key(0), (16, 64))
    e /= jnp.linalg.norm(e, axis=1, keepdims=True)
    x = 0.35 * e + jax.random.normal(jax.random.key(1), e.shape) / 8
    similarities = x / jnp.linalg.norm(x, axis=1, keepdims=True) @ e.T
    model, tx = small_model(), optax.adam(1e-3)

    def hard_loss(params):
        temperature = model.apply({"params": params}, method="temperature")
        return contrastive_loss(similarities / temperature, jnp.arange(16), jnp.ones(16, bool))

    def run(state, loss, steps):
        def gradients(params, *_):
            return jax.grad(loss)(params), {}

        def step(state, _):
            state, _ = train_step(state, random_batch(2), gradients=gradients, tx=tx)
            return state, state.params["temperature"]

        return jax.jit(jax.vmap(lambda state: jax.lax.scan(step, state, length=steps)))(state)

    def start(value):
        params = {"temperature": value}
        return TrainState(jnp.int32(0), jnp.int32(0), params, tx.init(params))

    state = jax.vmap(start)(jnp.array([0.07, -1.0, 3.0]))
    state, pushed = run(state, lambda params: params["temperature"], 1000)
    assert (pushed >= 0.001).all() and (pushed <= 0.5).all()
    np.testing.assert_allclose(pushed[:, -1], 0.001)
    losses = jax.jit(jax.vmap(lambda value: hard_loss({"temperature": value})))
    best = losses(jnp.linspace(0.01, 0.5, 50)).min()
    assert (losses(state.params["temperature"]) > 2 * best).all()
    state, _ = run(state, hard_loss, 1000)
    assert (losses(state.params["temperature"]) < 1.02 * best).all(), "the best there is"


def test_only_the_temperature_is_clamped():
    params = {"temperature": jnp.asarray(9.0), "other": jnp.asarray(9.0)}
    assert clamp_temperature(params) == {"temperature": 0.5, "other": 9.0}
    assert clamp_temperature({"other": params["other"]}) == {"other": 9.0}, "a run without VTC"


def test_norm_of_all_arrays():
    np.testing.assert_allclose(global_norm(PARAMS), optax.tree.norm(PARAMS), rtol=1e-6)
    matrix = {"kernel": jnp.full((2, 2), 3.0)}
    np.testing.assert_allclose(global_norm(matrix), 6.0)
