"""What a block keeps for its backward pass, by `model.remat`."""

import jax
import jax.numpy as jnp
import pytest

from vlmae.models.layers import vit_block

ROWS, TOKENS, WIDTH, HIDDEN, HEADS = 2, 7, 12, 40, 3
SAME = (ROWS, TOKENS, WIDTH)
HIDDEN_ONES = (ROWS, TOKENS, HIDDEN)


def kept_shapes(remat: str) -> list[tuple[int, ...]]:
    """Shapes of the activations that the backward pass of a block is handed."""
    block = vit_block(HEADS, HIDDEN, "block", remat=remat, dtype="float32", attention="xla")
    x = jnp.zeros(SAME)
    params = block.init(jax.random.key(0), x)
    backward = jax.eval_shape(lambda params, x: jax.vjp(block.apply, params, x)[1], params, x)
    parameters = [leaf.shape for leaf in jax.tree.leaves(params)]
    return [x.shape for x in jax.tree.leaves(backward) if x.ndim and x.shape not in parameters]


@pytest.mark.parametrize(
    ("remat", "weights", "hidden"),
    [("none", True, True), ("selective", False, True), ("full", False, False)],
)
def test_a_block_keeps_less(remat, weights, hidden):
    kept = kept_shapes(remat)
    attends = any(shape[-2:] == (TOKENS, TOKENS) for shape in kept)
    assert (attends, HIDDEN_ONES in kept) == (weights, hidden)


def test_full_keeps_the_input_alone():
    assert kept_shapes("full") == [SAME]


def test_selective_keeps_every_dense_layers_result_once():
    kept = kept_shapes("selective")
    assert kept.count(HIDDEN_ONES) == 1
    # The block's input, query, key, value and the output projection; the last layer needs no copy.
    assert kept.count(SAME) == 5
    assert len(kept) == 6
