"""Equal blocks as a loop: the same parameters, losses and gradients as one by one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize

from vlmae.config_tree import override
from vlmae.models.layers import Block, block_runs, run_blocks
from vlmae.models.video_language import build_model
from vlmae.objectives import compute_losses

DEEP = {
    "model.video.depth": 5,
    "model.text.depth": 3,
    "model.text.dropout": 0.0,
    "model.fusion.depth": 2,
    "model.pixel_decoder.depth": 2,
}
VARIANTS = {
    "thinned": {
        "model.video.sparsify.keep_rate": 0.6,
        "model.video.sparsify.stages": (2,),
        "model.remat": "selective",
    },
    "adapted": {
        "model.video.mask.ratio": 0.0,
        "objectives.mvm": 0.0,
        "model.video.adapter.frozen_blocks": 2,
        "model.text.adapter.frozen_blocks": 1,
        "model.fusion.kind": "concat",
    },
}


def loss_and_gradients(config, params, batch):
    """Of one training step with fixed random choices."""
    model = build_model(config)

    def loss_of(params):
        def run(model):
            return compute_losses(model, batch, jax.random.key(1), config.objectives).value

        return model.apply({"params": params}, method=run)

    return jax.jit(jax.value_and_grad(loss_of))(params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loop_computes_what_the_blocks_compute(variant):
    config = override(SMALL, DEEP | VARIANTS[variant])
    looped = override(config, {"model.scan_blocks": True})
    batch = random_batch()
    init = functools.partial(init_params, batch=batch, objectives=config.objectives)
    params = jax.jit(lambda: init(build_model(config)))()
    names = jax.tree.map(jnp.shape, jax.eval_shape(lambda: init(build_model(looped))))
    assert names == jax.tree.map(jnp.shape, params)

    params = randomize(params)
    expected = loss_and_gradients(config, params, batch)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, loss_and_gradients(looped, params, batch), expected)


class TwoBlocks(nn.Module):
    """Two blocks with dropout, as a loop."""

    @nn.compact
    def __call__(self, x):
        fields = {"pre_norm": True, "eps": 1e-6, "dropout": 0.5, "deterministic": False}
        return run_blocks([Block(2, 8, **fields, name=f"block_{i}") for i in range(2)], x)


def test_every_turn_draws_its_own_dropout():
    """With nothing but a bias of one left of a block, each adds either two or nothing."""
    x, keys = jnp.zeros((4, 6, 8)), {"dropout": jax.random.key(1)}
    params = TwoBlocks().init(keys | {"params": jax.random.key(0)}, x)["params"]
    params = jax.tree.map(jnp.zeros_like, params)
    for block in params.values():
        block["mlp"]["down"]["bias"] += 1
    added = TwoBlocks().apply({"params": params}, x, rngs=keys)
    assert set(np.unique(added)) == {0, 2, 4}  # 2: one turn dropped what the other did not


@pytest.mark.parametrize(
    ("alone", "expected"),
    [((), [[0, 1, 2, 3, 4]]), ((2,), [[0, 1], [2], [3, 4]]), ((0, 1), [[0], [1], [2, 3, 4]])],
)
def test_runs_end_where_a_block_is_unlike_the_others(alone, expected):
    assert block_runs(5, alone, together=True) == expected
    assert block_runs(5, alone, together=False) == [[i] for i in range(5)]
