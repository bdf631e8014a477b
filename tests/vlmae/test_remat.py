"""What a block keeps for its backward pass, by `model.remat`."""

import jax
import jax.numpy as jnp
import pytest

from vlmae.models.layers import vit_block

ROWS, TOKENS, WIDTH, HIDDEN, HEADS = 2, 7, 12, 40, 3
ATTENTION_WEIGHTS = HEADS * TOKENS  # of a token


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
