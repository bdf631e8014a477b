"""Blocks: what one keeps for its backward pass (`model.remat`), what equal ones share."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from vlmae.models.layers import Block, block_class, vit_block, vit_options

ROWS, TOKENS, WIDTH, HIDDEN, HEADS = 2, 7, 12, 40, 3
ATTENTION_WEIGHTS = HEADS * TOKENS  # of a token

# --- what is kept


def kept_sizes(remat: str) -> list[int]:
    """Numbers a token of each activation that the backward pass of a block is handed."""
    block = vit_block(HEADS, HIDDEN, "block", remat=remat, dtype="float32", attention="xla")
    x = jnp.zeros((ROWS, TOKENS, WIDTH))
    params = block.init(jax.random.key(0), x)
    backward = jax.eval_shape(lambda params, x: jax.vjp(block.apply, params, x)[1], params, x)
    parameters = [leaf.shape for leaf in jax.tree.leaves(params)]
    activations = [x for x in jax.tree.leaves(backward) if x.ndim and x.shape not in parameters]
    return [x.size // (ROWS * TOKENS) for x in activations]


@pytest.mark.parametrize(
    ("remat", "weights", "hidden"),
    [("none", True, True), ("selective", False, True), ("full", False, False)],
)
def test_a_block_keeps_less(remat, weights, hidden):
    kept = kept_sizes(remat)
    assert (ATTENTION_WEIGHTS in kept, HIDDEN in kept) == (weights, hidden)


def test_full_keeps_the_input_alone():
    assert kept_sizes("full") == [WIDTH]


def test_selective_keeps_every_dense_layers_result_once():
    # The block's input, query, key, value and the output projection; the last layer needs no copy.
    assert sorted(kept_sizes("selective")) == [WIDTH] * 5 + [HIDDEN]


# --- what is shared


class Stack(nn.Module):
    """Blocks with dropout that all read the same tokens."""

    mlp_dims: tuple[int, ...]
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        kind = partial(block_class(Block, self.remat), dropout=0.5, deterministic=False)
        options = [vit_options(HEADS, dim, "float32", "xla") for dim in self.mlp_dims]
        return [kind(**fields, name=f"block_{i}")(x) for i, fields in enumerate(options)]


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
def test_equal_blocks_are_one_program_with_dropout_of_their_own(remat):
    stack = Stack((HIDDEN, HIDDEN, HIDDEN + 1), remat)
    x = jax.random.normal(jax.random.key(0), (ROWS, TOKENS, WIDTH))
    keys = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    params = jax.jit(stack.init)(keys, x)
    run = partial(stack.apply, rngs={"dropout": jax.random.key(3)})
    calls = [e for e in jax.make_jaxpr(run)(params, x).jaxpr.eqns if e.primitive.name == "jit"]
    first, second, wider = (call.params["jaxpr"] for call in calls)
    assert first is second is not wider
    dropped = [y == x for y in jax.jit(run)(params, x)]
    for one, other in itertools.combinations(dropped, 2):
        assert 0.1 < one.mean() < 0.4, "a quarter: by attention and by the feed-forward network"
        assert (one != other).any()
