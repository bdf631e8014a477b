"""With activations in bfloat16, no gradient of a parameter is summed in bfloat16 on a device.

XLA's CPU backend widens such sums, so that values here could not show them; the program does.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL

from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.models.layers import Dense, affine
from vlmae.training.operations import trace_gradients
from vlmae.training.step import make_init
from vlmae.training.step_cost import count_flops, inner_jaxprs, sum_flops

SUMS = ("scatter-add", "scatter_add", "reduce_sum", "add_any", "cumsum")
TINY = {"model.dtype": "bfloat16", "model.text.depth": 1, "model.video.depth": 2}
CASES = {
    "SMAUG": {
        "model.video.sparsify.keep_rate": 0.7,
        "model.video.sparsify.stages": (1,),
        "model.selector.kind": "mlp",
        "model.selector.width": 8,
        "model.pixel_decoder.target_ratio": 0.5,
    },
    "MuLTI": {"model.fusion.kind": "multiway", "objectives.mcm": 1.0,
        "objectives.mcm_template_ids": (4, -1, -1, -1, -1), "objectives.mcm_len": 12,
    },
    "scales, tables and time": {
        "model.video.layout.layer_scale": 0.1,
        "model.video.positions": "learned",
        "model.video.mask.scheme": "none",
        "objectives.mvm": 0.0,
        "model.video.time_frames": 2,
    },
    "adapters": {
        "model.video.adapter.frozen_blocks": 1,
        "model.video.adapter.width": 8,
        "model.video.adapter.num_heads": 2,
    },
}  # fmt: skip


def rounded_sums(jaxpr, shapes: set) -> set[tuple]:
    """Sums in bfloat16 whose results have the shape of a parameter, by primitive and shape."""
    found = set()
    for eqn in jaxpr.eqns:
        for inner in inner_jaxprs(eqn):
            found |= rounded_sums(inner, shapes)
        out = eqn.outvars[0].aval
        if eqn.primitive.name in SUMS and out.dtype == jnp.bfloat16 and out.shape in shapes:
            found.add((eqn.primitive.name, out.shape))
    return found


def parameter_shapes(config: ExperimentConfig) -> set[tuple[int, ...]]:
    """Shapes of all parameters, which activations here do not have."""
    params = jax.eval_shape(make_init(config), 0).params
    return {x.shape for x in jax.tree.leaves(params)} - {()}


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_of_a_parameter_is_summed_in_bfloat16(name):
    # 5 frames and rows of 6: no shape of activations is that of a parameter
    config = override(SMALL, TINY | CASES[name] | {"data.train.0.num_frames": 5})
    program = trace_gradients(config, 5).jaxpr
    assert rounded_sums(program, parameter_shapes(config)) == set()


def test_this_would_be_noticed():
    """Flax's own layers, differentiated as they stand."""
    embed, dense = nn.Embed(40, 16, dtype=jnp.bfloat16), nn.Dense(24, dtype=jnp.bfloat16)
    ids = jnp.zeros((6, 8), jnp.int32)

    def loss(table, params):
        x = embed.apply({"params": {"embedding": table}}, ids)
        return dense.apply({"params": params}, x).astype(jnp.float32).sum()

    params = {"kernel": jnp.ones((16, 24)), "bias": jnp.ones(24)}
    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((40, 16)), params).jaxpr
    assert {shape for _, shape in rounded_sums(program, {(40, 16), (24,)})} == {(40, 16), (24,)}


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_remat_recomputes_the_same_in_both_types(remat):
    """Dense layers of bfloat16 have a gradient of their own, which hides them from policies."""
    counts = [
        sum_flops(count_flops(trace_gradients(override(SMALL, changes), 2)))
        for changes in ({"model.remat": remat, "model.dtype": x} for x in ("float32", "bfloat16"))
    ]
    assert counts[0] == counts[1] and counts[0].recomputed > 0


@pytest.mark.parametrize("sums", ["bfloat16", "float32"])
def test_gradients_of_a_dense_layer_against_float64(sums):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 500, 16)), jnp.bfloat16)
    kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 24), (24,)))
    y, vjp = jax.vjp(lambda *args: affine(*args, sums), x, kernel, bias)
    assert y.dtype == jnp.bfloat16
    grad = jnp.asarray(0.3 + rng.normal(size=y.shape), jnp.bfloat16)
    by_x, by_kernel, by_bias = vjp(grad)
    wide = [np.asarray(z, np.float64).reshape(-1, z.shape[-1]) for z in (x, grad)]
    assert (by_kernel.dtype, by_bias.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(by_bias, wide[1].sum(axis=0), rtol=1e-5)
    difference = np.abs(by_kernel - wide[0].T @ wide[1]) / np.abs(wide[0].T @ wide[1]).max()
    assert difference.max() < (5e-3 if sums == "bfloat16" else 1e-6)
    rounded = by_kernel == by_kernel.astype(jnp.bfloat16)
    assert rounded.all() == (sums == "bfloat16")
    wanted = wide[1] @ np.asarray(kernel.astype(jnp.bfloat16), np.float64).T
    np.testing.assert_allclose(np.float64(by_x).reshape(-1, 16), wanted, rtol=2e-2, atol=0.05)


def test_the_float32_layer_is_the_plain_one():
    """Values and gradients, bit for bit, and the same parameters."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 16)), jnp.float32)
    ours, plain = Dense(24), nn.Dense(24)
    params = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, plain.init(jax.random.key(0), x))
    np.testing.assert_array_equal(ours.apply(params, x), plain.apply(params, x))
