"""Choice of frames: the best ones, in order, and what a swap of one of them would do."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from oracles import random, softmax

from vlmae.ops.token_pruning import (
    choose_frames,
    straight_through,
    swap_probabilities,
    uniform_frames,
)

choose = jax.jit(choose_frames, static_argnums=1)
swaps_of = jax.jit(swap_probabilities)


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5, 6]))
def test_the_best_frames_in_temporal_order(seed, count):
    scores = random(4, 6, seed=seed)
    frames = np.asarray(choose(scores, count))
    assert frames.shape == (4, count) and (np.diff(frames, axis=1) > 0).all()
    expected = np.sort(np.argsort(-scores, axis=1)[:, :count], axis=1)
    np.testing.assert_array_equal(frames, expected)


def test_of_equal_scores_the_earlier_frames_are_kept():
    assert choose(np.zeros((1, 5), np.float32), 2).tolist() == [[0, 1]]


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 5]))
def test_a_slot_swaps_its_frame_for_free_ones_by_the_softmax(seed, count):
    rng = np.random.default_rng(seed)
    scores = 2 * random(2, 5, seed=seed)
    frames = np.stack([np.sort(rng.permutation(5)[:count]) for _ in range(2)])
    found = np.asarray(swaps_of(scores, frames))
    for b, slot in np.ndindex(frames.shape):
        allowed = sorted({frames[b, slot]} | set(range(5)) - set(frames[b]))
        expected = np.zeros(5)
        expected[allowed] = softmax(scores[b, allowed])
        np.testing.assert_allclose(found[b, slot], expected, rtol=1e-4, atol=1e-7)
    level = np.float32(rng.normal() * 100)
    np.testing.assert_allclose(swaps_of(scores + level, frames), found, atol=1e-4)


@pytest.mark.parametrize("trailing", [(), (4,), (4, 6)])
def test_the_straight_through_gradient_is_that_of_a_mean_of_frames(trailing):
    kept, frames, g = (jnp.asarray(random(3, k, *trailing, seed=k)) for k in (2, 5, 2))
    swaps = jnp.asarray(random(3, 2, 5, seed=9))
    out, vjp = jax.vjp(straight_through, kept, frames, swaps)
    to_kept, to_frames, to_swaps = vjp(g)
    np.testing.assert_array_equal(out, kept)
    np.testing.assert_array_equal(to_kept, g)
    assert not to_frames.any()
    expected = np.einsum("bkn,btn->bkt", g.reshape(3, 2, -1), frames.reshape(3, 5, -1))
    np.testing.assert_allclose(to_swaps, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_bfloat16_frames_is_summed_in_float32():
    kept, frames, g = (jnp.asarray(random(1, k, 4096, seed=k), jnp.bfloat16) for k in (1, 2, 1))
    _, vjp = jax.vjp(straight_through, kept, frames, jnp.ones((1, 1, 2)))
    to_swaps = vjp(g)[2]
    expected = np.einsum("bkn,btn->bkt", np.float64(g), np.float64(frames))
    assert to_swaps.dtype == np.float32
    np.testing.assert_allclose(to_swaps, expected, rtol=1e-4)


@hypothesis.given(st.integers(1, 200), st.data())
def test_uniform_frames_are_the_middles_of_segments(frames, data):
    count = data.draw(st.integers(1, frames))
    chosen = uniform_frames(frames, count)
    assert chosen == tuple(np.floor((np.arange(count) + 0.5) * frames / count + 1e-9).astype(int))
    assert len(set(chosen)) == count and 0 <= chosen[0] and chosen[-1] < frames
