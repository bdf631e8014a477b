"""Blocks: activations kept for the backward pass (`model.remat`), programs that they share."""

import dataclasses
import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import SMALL, random_batch, small_model

from vlmae.models.blocks import Block, vit_block
from vlmae.models.layers import Compute

ROWS, TOKENS, WIDTH, HIDDEN, HEADS = 2, 7, 12, 40, 3
ATTENTION_WEIGHTS = HEADS * TOKENS  # of a token
KEY = jax.random.key(0)

# --- what is kept


def kept_sizes(remat: str) -> list[int]:
    """Returns the size per token of each activation kept for a block's backward pass."""
    block = vit_block(HEADS, HIDDEN, Compute(remat=remat), name="block")
    x = jnp.zeros((ROWS, TOKENS, WIDTH))
    params = block.init(jax.random.key(0), x)
    backward = jax.eval_shape(lambda params, x: jax.vjp(block.apply, params, x)[1], params, x)
    parameters = [leaf.shape for leaf in jax.tree.leaves(params)]
    activations = [x for x in jax.tree.leaves(backward) if x.ndim and x.shape not in parameters]
    return [x.size // (ROWS * TOKENS) for x in activations]


def test_what_a_block_keeps_of_its_activations():
    everything = kept_sizes("none")
    assert ATTENTION_WEIGHTS in everything and HIDDEN in everything
    # The block's input, query, key, value and the output projection; the last layer needs no copy.
    assert sorted(kept_sizes("selective")) == [WIDTH] * 5 + [HIDDEN]
    assert kept_sizes("full") == [WIDTH]


# --- what is shared


class Stack(nn.Module):
    """Blocks with dropout that all read the same tokens."""

    mlp_dims: tuple[int, ...]
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        make = partial(vit_block, HEADS, dropout=0.5, deterministic=False)
        compute = Compute(remat=self.remat)
        blocks = [make(d, compute, name=f"block_{i}") for i, d in enumerate(self.mlp_dims)]
        return [block(x) for block in blocks]


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


@pytest.mark.parametrize("deterministic", [False, True])
def test_dropout_follows_every_sublayer_of_bert_and_the_embeddings(deterministic):
    """In text encoder and fusion."""
    text = dataclasses.replace(SMALL.model.text, dropout=0.25)
    model = small_model(text=text).clone(deterministic=deterministic)
    batch, found = random_batch(2), []

    def record(call, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dropout) and module.rate:
            found.append((module.path[:-1], module.rate, module.deterministic, args[0].shape))
        return call(*args, **kwargs)

    def run(model):
        with nn.intercept_methods(record):
            words = model.encode_text(batch.text_ids, batch.text_mask)
            return model.fuse(model.encode_video(batch.video), words)

    jax.eval_shape(lambda: model.init({"params": KEY, "dropout": KEY}, method=run))
    places = [("text_encoder", "embeddings")]
    places += [("text_encoder", "block_0")] * 2  # attention, feed-forward network
    places += [("fusion", "block_0")] * 3  # and cross-attention between them
    assert found == [(place, 0.25, deterministic, (2, 8, 16)) for place in places]


def test_dropout_falls_on_what_a_sublayer_adds():
    """Attention that adds 3 everywhere: with dropout of a quarter, 4 or nothing."""
    block = Block(HEADS, HIDDEN, pre_norm=False, eps=1e-12, dropout=0.25, deterministic=False)
    x, seen = jax.random.normal(KEY, (200, TOKENS, WIDTH)), []
    params = jax.tree.map(jnp.zeros_like, jax.jit(block.init)({"params": KEY, "dropout": KEY}, x))
    params["params"]["attention"]["out"]["bias"] += 3.0

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.LayerNorm):
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        block.apply(params, x, rngs={"dropout": KEY})
    added = seen[0] - x
    kept = added > 2
    assert abs(float(kept.mean()) - 0.75) < 0.02  # of 16,800
    assert jnp.allclose(added, jnp.where(kept, 4.0, 0.0), atol=1e-5)
