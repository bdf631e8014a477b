"""Adapt-pooling and the sampler (MuLTI) against NumPy."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from multiway_oracle import (
    HEADS,
    HIDDEN,
    LATENTS,
    LENGTHS,
    POOLINGS,
    WIDTH,
    assert_close,
    float64,
    pool_row,
    random_params,
    sampler,
    way_layer,
)
from oracles import random, softmax

from vlmae.models.attention import Attention, Source
from vlmae.models.multiway import AdaptPooling, LatentLayer, Sampler
from vlmae.ops.pooling import block_members, weighted_pool

# --- pooling


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(12, 4), (13, 4), (7, 7), (3, 5), (9, 1)])
def test_blocks_are_adaptive_bins(num_tokens, num_blocks):
    lengths = np.arange(1, num_tokens + 1, dtype=np.int32)
    members = jax.jit(block_members, static_argnums=(1, 2))(lengths, num_tokens, num_blocks)
    for row, n in enumerate(lengths):
        for i in range(num_blocks):
            start, end = math.floor(i * n / num_blocks), math.ceil((i + 1) * n / num_blocks)
            expected = np.isin(np.arange(num_tokens), np.arange(start, end))
            assert expected.any()
            np.testing.assert_array_equal(members[row, i], expected)


@pytest.mark.parametrize("one_row_of", ["neither", "scores", "members"])
def test_weighted_pool(one_row_of):
    x, scores = random(4, 6, 5), random(4, 1 if one_row_of == "scores" else LATENTS, 6, seed=1)
    lengths = jnp.asarray(LENGTHS)
    members = block_members(lengths, 6, 1 if one_row_of == "members" else LATENTS)
    logits = np.where(members, np.float64(scores), -np.inf)
    assert_close(jax.jit(weighted_pool)(x, scores, members), softmax(logits) @ x)


@partial(jax.jit, static_argnums=3)
def block_pool(x, scores, lengths, num_blocks):
    return weighted_pool(x, scores, block_members(lengths, x.shape[1], num_blocks))


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(12, 4), (13, 4), (3, 5)])
def test_equal_scores_are_average_pooling(num_tokens, num_blocks):
    torch = pytest.importorskip("torch")
    x, scores = random(2, num_tokens, 5), np.full((2, 1, num_tokens), 3.0, np.float32)
    average = torch.nn.functional.adaptive_avg_pool1d
    expected = average(torch.tensor(x).swapaxes(1, 2), num_blocks).swapaxes(1, 2).numpy()
    assert_close(block_pool(x, scores, np.array([num_tokens] * 2), num_blocks), expected)


def test_no_gradient_into_padding_or_its_scores():
    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(x, scores):
        return (block_pool(x, scores, LENGTHS, LATENTS) ** 2).sum()

    x, scores = gradients(random(4, 6, 5), random(4, 1, 6, seed=1))
    valid = np.arange(6) < LENGTHS[:, None]
    np.testing.assert_array_equal((x != 0).any(axis=-1), valid)
    assert not scores[:, 0][~valid].any() and scores[:, 0][valid].any()


@pytest.mark.parametrize("zero", [False, True], ids=["random", "zero"])
@pytest.mark.parametrize("kind", POOLINGS[:-1])
def test_adapt_pooling(kind, zero):
    """Without importances "block" is average pooling of blocks, and "global" of everything."""
    queries, source = random(4, LATENTS, WIDTH), random(4, 6, WIDTH, seed=1)
    module = AdaptPooling(kind, HEADS)
    params = random_params(module.init, queries, source, LENGTHS)
    params = jax.tree.map(jnp.zeros_like, params) if zero else params
    pool = jax.jit(partial(module.apply, {"params": params}))
    rows = list(zip(queries, source, LENGTHS, strict=True))
    if zero and kind != "attention":
        bins = {"block": LATENTS, "mean": LATENTS, "global": 1}[kind]
        averages = [pool_row("mean", q[:bins], x[:n], {}) for q, x, n in rows]
        expected = np.broadcast_to(averages, queries.shape) if kind == "global" else averages
    else:
        expected = [pool_row(kind, q, x[:n], float64(params)) for q, x, n in rows]
    assert_close(pool(queries, source, LENGTHS), np.stack(expected))
    everything = [pool_row(kind, q, x, float64(params)) for q, x, _ in rows]
    assert_close(pool(queries, source), np.stack(everything))


# --- layers and samplers


def make_layer() -> LatentLayer:
    return LatentLayer(Attention(HEADS), HIDDEN)


@pytest.mark.parametrize("tokens", [0, 6])
def test_way_layer(tokens):
    z, source = random(4, LATENTS, WIDTH), random(4, tokens, WIDTH, seed=1)
    inputs = (z, Source(source), LENGTHS) if tokens else (z,)
    params = random_params(make_layer().init, *inputs)
    p, valid = float64(params), np.arange(tokens) < LENGTHS[:, None]
    expected = way_layer(z, source, valid, p, p["attention"])
    assert_close(jax.jit(make_layer().apply)({"params": params}, *inputs), expected)


SOURCE, GUIDE = random(4, 6, WIDTH), random(4, 2, WIDTH, seed=1)


@cache
def make_sampler(pooling: str):
    """The parameters, and (source, lengths, guide, guidance) -> latents."""
    module = Sampler(LATENTS, pooling, (make_layer(), make_layer()), HEADS)
    params = random_params(module.init, Source(SOURCE), LENGTHS)

    def sample(source, *rest):
        return module.apply({"params": params}, Source(source), *rest)

    return params, jax.jit(sample, static_argnums=3)


@pytest.mark.parametrize(
    ("pooling", "guide_in"),
    [("block", "context"), ("block", "queries"), ("attention", "none"), ("none", "context")],
)
def test_sampler(pooling, guide_in):
    params, sample = make_sampler(pooling)
    p, valid = float64(params), np.arange(6) < LENGTHS[:, None]
    layers = [(p[f"layers_{i}"], p[f"layers_{i}"]["attention"]) for i in range(2)]
    for lengths, seen in ((LENGTHS, valid), (None, np.ones_like(valid))):
        expected = sampler(p["latents"], SOURCE, seen, pooling, p, layers, GUIDE, guide_in)
        assert_close(sample(SOURCE, lengths, GUIDE, guide_in), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_no_latent_and_gets_no_gradient(pooling):
    sample = make_sampler(pooling)[1]
    longer = np.concatenate([SOURCE, SOURCE], axis=1)
    valid = np.arange(12) < LENGTHS[:, None]
    longer[~valid] = 1e3 * random(*longer[~valid].shape, seed=2)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_latents(source):
        latents = sample(source, LENGTHS, GUIDE, "context")
        return (latents**3).sum(), latents

    gradient, latents = gradient_and_latents(longer)
    assert_close(latents, sample(SOURCE, LENGTHS, GUIDE, "context"))
    np.testing.assert_array_equal((gradient != 0).any(axis=-1), valid)
