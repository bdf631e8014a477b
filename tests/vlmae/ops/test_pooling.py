"""Pooling of tokens: blocks against a loop with fractions, weights against NumPy."""

import math
from fractions import Fraction

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from oracles import random, softmax

from vlmae.ops.pooling import block_members, weighted_pool

TOKENS = 13
members = jax.jit(block_members, static_argnums=(1, 2))
pool = jax.jit(weighted_pool)


@hypothesis.given(
    st.lists(st.integers(1, TOKENS), min_size=3, max_size=3), st.sampled_from([1, 2, 5, 13])
)
def test_blocks_are_contiguous_and_nearly_equal(lengths, count):
    """Bin edges floor(i n / s) and ceil((i + 1) n / s) of each row's valid tokens alone."""
    found = np.asarray(members(jnp.array(lengths), TOKENS, count))
    assert found.shape == (3, count, TOKENS)
    for row, n in zip(found, lengths, strict=True):
        for i, block in enumerate(row):
            start = math.floor(Fraction(i * n, count))
            end = math.ceil(Fraction((i + 1) * n, count))
            assert np.flatnonzero(block).tolist() == list(range(start, end))
        assert row.any(axis=1).all() and row.any(axis=0).sum() == n
        assert row.sum() == n or n % count, "no token is in two blocks where they fit"


@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(-1e3, 1e3))
def test_a_pool_is_the_weighted_mean_of_its_members(seed, level):
    x, scores = random(2, 7, 4, seed=seed), 3 * random(2, 3, 7, seed=seed + 1)
    chosen = np.random.default_rng(seed).random((2, 3, 7)) < 0.5
    chosen[..., seed % 7] = True  # every pool needs a member
    expected = np.zeros((2, 3, 4))
    for b, s in np.ndindex(2, 3):
        expected[b, s] = softmax(scores[b, s, chosen[b, s]]) @ x[b, chosen[b, s]]
    np.testing.assert_allclose(pool(x, scores, chosen), expected, rtol=1e-4, atol=1e-5)
    shifted = pool(x, scores + np.float32(level), chosen)
    np.testing.assert_allclose(shifted, expected, rtol=2e-3, atol=2e-3)  # of scores near 1000
    garbage = np.where(chosen.any(axis=1)[..., None], x, np.float32(1e30))
    np.testing.assert_allclose(pool(garbage, scores, chosen), expected, rtol=1e-4, atol=1e-5)


def test_equal_scores_average_and_one_token_a_pool_is_the_identity():
    x, everywhere = random(2, 6, 4), np.ones((1, 1, 6), bool)
    mean = pool(x, np.zeros((1, 1, 6), np.float32), everywhere)
    np.testing.assert_allclose(mean, x.mean(axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
    each = block_members(jnp.array([6, 6]), 6, 6)
    np.testing.assert_array_equal(pool(x, random(1, 1, 6), each), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_float32_and_tokens_keep_their_type(dtype):
    """Whatever the type of the scores."""
    x, scores = jnp.asarray(np.eye(2)[None], dtype), jnp.array([[[0.0, 1.0]]], jnp.bfloat16)
    pooled = pool(x, scores, jnp.ones((1, 1, 2), bool))
    assert pooled.dtype == dtype
    rounding = 1e-6 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(np.float32(pooled[0, 0]), softmax(np.arange(2.0)), rtol=rounding)
