"""Pruning of tokens against NumPy: counts, scores, selection, a whole encoder."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from helpers import SMALL, random_batch, randomize, small_model
from oracles import dense, feed_forward, layer_norm, random, softmax

from vlmae.config.model import SparsifyConfig
from vlmae.models.attention import xla_attention
from vlmae.models.blocks import Block, PruningBlock
from vlmae.models.embeddings import sincos_positions
from vlmae.models.video_encoder import VideoEncoder, mean_token
from vlmae.ops import token_pruning
from vlmae.ops.masking import mask_from_noise
from vlmae.ops.token_pruning import NO_PATCH
from vlmae.training.features import sample_mask

GRID, HEADS = (4, 4), 2


# --- counts


def test_kept_tokens_of_three_stages_with_the_fused_token():
    count, counts = 68, []
    for _ in range(3):
        count = token_pruning.num_kept(count, 0.7) + 1
        counts.append(count)
    assert counts == [49, 36, 27]


@pytest.mark.parametrize(
    ("tokens", "rate", "expected"),
    [(10, 0.7, 7), (20, 0.55, 11), (100, 0.07, 7), (7, 0.5, 4), (5, 1.0, 5), (5, 0.001, 1)],
)
def test_kept_tokens_are_rounded_up_but_not_by_float_error(tokens, rate, expected):
    assert token_pruning.num_kept(tokens, rate) == expected


# --- scores


def attention_oracle(query: np.ndarray, key: np.ndarray, bias: np.ndarray = 0.0) -> np.ndarray:
    """[f h q k], one head at a time."""
    heads = [
        np.einsum("fqd,fkd->fqk", query[:, :, h], key[:, :, h]) / math.sqrt(8)
        for h in range(query.shape[2])
    ]
    return softmax(np.stack(heads, axis=1) + bias)


@pytest.mark.parametrize("bias", [None, 2 * random(3, 4, 6, 6, seed=2)], ids=["", "biased"])
def test_attention_scores(bias):
    query, key = 2 * random(3, 6, 4, 8), 2 * random(3, 6, 4, 8, seed=1)
    weights = attention_oracle(query, key, 0.0 if bias is None else bias)
    by_cls = jax.jit(token_pruning.cls_attention)(query, key, bias)
    by_all = jax.jit(token_pruning.mean_attention)(query, key, bias)
    np.testing.assert_allclose(by_cls, weights.mean(axis=1)[:, 0, 1:], rtol=1e-4)
    np.testing.assert_allclose(by_all, weights.mean(axis=(1, 2))[:, 1:], rtol=1e-4)


def test_norm_and_random_scores_sum_to_one():
    tokens, noise = random(3, 6, 8), np.abs(random(3, 6))
    norms = np.sqrt((tokens**2).sum(axis=-1))
    expected = norms / norms.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(token_pruning.norm_score)(tokens), expected, rtol=1e-5)
    expected = noise / noise.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(token_pruning.random_score)(noise), expected, rtol=1e-5)


# --- selection


def prune_oracle(tokens, patch_ids, scores, keep_rate: float, rest: str):
    """Prunes frame by frame, token by token."""
    new_tokens, new_ids = [], []
    for x, ids, score in zip(tokens, patch_ids, scores, strict=True):
        count = math.ceil(round(len(score) * keep_rate, 6))
        kept = sorted(sorted(range(len(score)), key=lambda j: -score[j])[:count])
        rows, kept_ids = [x[0], *(x[1 + j] for j in kept)], [ids[j] for j in kept]
        if rest == "fuse":
            others = set(range(len(score))) - set(kept)
            rows.append(sum(score[j] * x[1 + j] for j in others))
            kept_ids.append(NO_PATCH)
        new_tokens.append(rows)
        new_ids.append(kept_ids)
    return np.array(new_tokens), np.array(new_ids)


def prune_inputs():
    """Seven tokens in each of three frames; one of each was fused earlier."""
    patch_ids = np.stack([np.random.default_rng(i).permutation(16)[:7] for i in range(3)])
    patch_ids = np.where(np.arange(7) == 6, NO_PATCH, np.sort(patch_ids)).astype(np.int32)
    return random(3, 8, 5), patch_ids, softmax(random(3, 7, seed=1))


@pytest.mark.parametrize("rest", ["fuse", "drop"])
@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_prune_against_a_loop(rest, rate):
    inputs = prune_inputs()
    pruned = jax.jit(partial(token_pruning.prune, keep_rate=rate, rest=rest))(*inputs)
    tokens, patch_ids = prune_oracle(*inputs, rate, rest)
    np.testing.assert_allclose(pruned.tokens, tokens, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pruned.patch_ids, patch_ids)


@pytest.mark.parametrize("rest", ["fuse", "drop"])
def test_only_fused_tokens_live_on(rest):
    tokens, patch_ids, scores = prune_inputs()

    def total(tokens, patch_ids, scores):
        return token_pruning.prune(tokens, patch_ids, scores, keep_rate=0.5, rest=rest).tokens.sum()

    kept = scores >= np.sort(scores)[:, -4:-3]
    expected = np.where(kept, 1.0, scores if rest == "fuse" else 0.0)
    gradient = np.asarray(jax.jit(jax.grad(total))(tokens, patch_ids, scores))
    np.testing.assert_allclose(gradient[:, 1:, 0], expected, rtol=1e-5)
    assert (gradient[:, 0] == 1).all()


def test_keep_rate_one_changes_nothing():
    tokens, patch_ids, scores = map(jnp.asarray, prune_inputs())
    pruned = token_pruning.prune(tokens, patch_ids, scores, keep_rate=1.0, rest="fuse")
    assert pruned.tokens is tokens and pruned.patch_ids is patch_ids


def test_an_unknown_rest_is_an_error():
    tokens, patch_ids, scores = map(jnp.asarray, prune_inputs())
    with pytest.raises(ValueError, match="'keep'; known are fuse, drop"):
        token_pruning.prune(tokens, patch_ids, scores, keep_rate=0.5, rest="keep")


# --- merging


def merge_oracle(tokens, patch_ids, sizes, keys, keep_rate: float):
    """Merges frame by frame: the most similar pairs of an even place and an odd one (ToMe)."""
    frames = []
    for x, ids, size, key in zip(tokens[:, 1:], patch_ids, sizes, keys, strict=True):
        places = range(len(ids))
        key = key / np.linalg.norm(key, axis=1, keepdims=True)
        partner = {i: max(places[1::2], key=lambda j: key[i] @ key[j]) for i in places[::2]}
        by_similarity = sorted(partner, key=lambda i: -key[i] @ key[partner[i]])
        merged = by_similarity[: len(ids) - math.ceil(round(len(ids) * keep_rate, 6))]
        groups = [[j, *(i for i in merged if partner[i] == j)] for j in places if j not in merged]
        frames.append(
            [
                (
                    np.average(x[group], axis=0, weights=size[group]),
                    ids[group[0]],
                    size[group].sum(),
                )
                for group in groups
            ]
        )
    columns = zip(*(zip(*frame, strict=True) for frame in frames), strict=True)
    return tuple(np.array(column) for column in columns)


def merge_inputs(count: int):
    patch_ids = np.stack([np.random.default_rng(i).permutation(16)[:count] for i in range(3)])
    sizes = 1.0 + np.random.default_rng(5).integers(0, 3, (3, count)).astype(np.float32)
    keys = random(3, count, 6, seed=1)
    return random(3, count + 1, 5), np.sort(patch_ids).astype(np.int32), sizes, keys


@pytest.mark.parametrize("count", [7, 8])
@pytest.mark.parametrize("rate", [0.5, 0.7, 0.9])
def test_merge_against_a_loop(count, rate):
    inputs = merge_inputs(count)
    merged = jax.jit(partial(token_pruning.merge, keep_rate=rate))(*inputs)
    tokens, patch_ids, sizes = merge_oracle(*inputs, rate)
    np.testing.assert_allclose(merged.tokens[:, 1:], tokens, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged.tokens[:, 0], inputs[0][:, 0])
    np.testing.assert_array_equal(merged.patch_ids, patch_ids)
    np.testing.assert_allclose(merged.sizes, sizes)


def test_a_merged_token_counts_as_the_equal_tokens_that_it_stands_for():
    """In attention, and in the mean of a frame."""
    twins = jnp.asarray(np.repeat(random(2, 3, 5), 2, axis=1))
    tokens = jnp.concatenate([random(2, 1, 5, seed=1), twins], axis=1)
    patch_ids = jnp.tile(jnp.arange(6, dtype=jnp.int32), (2, 1))
    merged = token_pruning.merge(tokens, patch_ids, None, twins, 0.5)
    np.testing.assert_allclose(merged.tokens[:, 1:], twins[:, ::2], rtol=1e-6)
    np.testing.assert_array_equal(merged.sizes, np.full((2, 3), 2.0))
    bias = token_pruning.size_bias(merged.sizes)
    few, many = (x[:, :, None] for x in (merged.tokens, tokens))
    read = xla_attention(many, few, few, bias=bias)
    np.testing.assert_allclose(read, xla_attention(many, many, many), rtol=1e-4, atol=1e-5)
    uneven = jnp.concatenate([twins[:, :2], twins[:, 4:]], axis=1)
    sizes = jnp.array([[2.0, 1.0, 1.0]] * 2)
    mean = mean_token(tokens, uneven[:, 1:], sizes)
    np.testing.assert_allclose(mean[:, 0], uneven.mean(axis=1), rtol=1e-5)


def test_merging_everything_that_can_be_merged_loses_no_patch():
    inputs = merge_inputs(8)
    tokens, sizes = inputs[0], inputs[2]
    merged = token_pruning.merge(*map(jnp.asarray, inputs), keep_rate=0.5)
    assert merged.sizes.shape == (3, 4)
    np.testing.assert_allclose(merged.sizes.sum(axis=1), sizes.sum(axis=1))
    total = jnp.einsum("fm,fmd->fd", merged.sizes, merged.tokens[:, 1:])
    np.testing.assert_allclose(total, np.einsum("fm,fmd->fd", sizes, tokens[:, 1:]), rtol=1e-4)


def test_merging_at_rate_one_changes_nothing():
    inputs = tuple(map(jnp.asarray, merge_inputs(8)))
    merged = token_pruning.merge(*inputs, keep_rate=1.0)
    assert merged.tokens is inputs[0] and merged.sizes is inputs[2]


def test_merging_less_than_half_is_refused():
    with pytest.raises(ValueError, match=r"--rest=merge joins tokens in pairs.*0\.4"):
        SparsifyConfig(keep_rate=0.7, eval_keep_rate=0.4, rest="merge")


# --- blocks and encoders, recomputed step by step from their parameters


def self_attention(
    x: np.ndarray, p: dict, bias: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens after the residual sum, the attention [f h q k], the keys' mean over heads."""
    y, p = layer_norm(x, p["attention_norm"]), p["attention"]
    query, key = (
        rearrange(dense(y, p[n]), "f q (h d) -> f q h d", h=HEADS) for n in ("query", "key")
    )
    weights = attention_oracle(query, key, bias)
    value = rearrange(dense(y, p["value"]), "f q (h d) -> f h q d", h=HEADS)
    x = x + dense(rearrange(weights @ value, "f h q d -> f q (h d)"), p["out"])
    return x, weights, key[:, 1:].mean(axis=2)


def scores_oracle(name: str, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if name == "norm":
        norms = np.linalg.norm(x[:, 1:], axis=-1)
        return norms / norms.sum(axis=-1, keepdims=True)
    rows = weights[:, :, :1] if name == "cls_attention" else weights
    return rows[..., 1:].mean(axis=(1, 2))


def encoder_oracle(params: dict, x: np.ndarray, config: SparsifyConfig):
    """Computes features of embedded tokens, and patch ids after each stage; depth 3."""
    patch_ids = np.tile(np.arange(x.shape[1] - 1), (len(x), 1))
    stages, sizes = [patch_ids], np.ones(patch_ids.shape)
    for i in range(3):
        layer = params[f"block_{i}"]
        bias = np.log(np.pad(sizes, ((0, 0), (1, 0)), constant_values=1.0))[:, None, None]
        x, weights, keys = self_attention(x, layer, bias)
        if i in config.stages and config.rest == "merge":
            inputs = (x, patch_ids, sizes, keys)
            tokens, patch_ids, sizes = merge_oracle(*inputs, config.keep_rate)
            x = np.concatenate([x[:, :1], tokens], axis=1)
            stages.append(patch_ids)
        elif i in config.stages:
            scores = scores_oracle(config.score, x, weights)
            x, patch_ids = prune_oracle(x, patch_ids, scores, config.keep_rate, config.rest)
            sizes = np.ones(patch_ids.shape)
            stages.append(patch_ids)
        x = x + feed_forward(layer_norm(x, layer["mlp_norm"]), layer["mlp"])
    return layer_norm(x, params["norm"]), stages


def pruning_encoder(config: SparsifyConfig) -> VideoEncoder:
    video = dataclasses.replace(SMALL.model.video, depth=3, sparsify=config)
    return VideoEncoder(video, GRID, config.keep_rate)


@pytest.fixture(scope="module")
def params():
    """Parameters of an encoder of depth 3; the same with pruning and without."""
    module = pruning_encoder(SparsifyConfig())
    return randomize(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 16, 48)))["params"])


def embedded(params: dict, patches: np.ndarray) -> np.ndarray:
    """Tokens before the first block, [CLS] first."""
    x = dense(patches, params["patch_embed"]) + sincos_positions(*GRID, 16)
    x = rearrange(x, "b t n d -> (b t) n d")
    cls = np.broadcast_to(params["cls"], (len(x), 1, 16))
    return np.concatenate([cls, x], axis=1)


@pytest.mark.parametrize(
    ("score", "rest", "counts"),
    [
        ("cls_attention", "fuse", [16, 11, 8]),
        ("cls_attention", "drop", [16, 10, 6]),
        ("mean_attention", "fuse", [16, 11, 8]),
        ("norm", "drop", [16, 10, 6]),
        ("norm", "merge", [16, 10, 6]),
    ],
)
def test_an_encoder_of_two_stages_step_by_step(params, score, rest, counts):
    config = SparsifyConfig(keep_rate=0.6, stages=(0, 1), score=score, rest=rest)
    patches = random(2, 2, 16, 48)
    video = jax.jit(pruning_encoder(config).apply)({"params": params}, patches)
    host = jax.device_get(params)
    x, stages = encoder_oracle(host, embedded(host, patches), config)
    assert [patch_ids.shape[2] for patch_ids in video.stage_patch_ids] == counts
    for ours, theirs in zip(video.stage_patch_ids, stages, strict=True):
        np.testing.assert_array_equal(rearrange(ours, "b t m -> (b t) m"), theirs)
    x = rearrange(x, "(b t) q d -> b t q d", b=2)
    np.testing.assert_allclose(video.tokens, x[:, :, 1:], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(video.frame_cls, x[:, :, 0], rtol=1e-3, atol=1e-4)


def test_a_pruning_block_that_keeps_all_is_a_block(params):
    sizes = {"num_heads": HEADS, "mlp_dim": 32, "pre_norm": True, "eps": 1e-6}
    x, patch_ids = random(2, 6, 16), np.tile(np.arange(5, dtype=np.int32), (2, 1))
    variables = {"params": params["block_0"]}
    pruned = jax.jit(PruningBlock(**sizes, keep_rate=1.0).apply)(variables, x, patch_ids)
    np.testing.assert_array_equal(pruned.tokens, jax.jit(Block(**sizes).apply)(variables, x))
    np.testing.assert_array_equal(pruned.patch_ids, patch_ids)


@pytest.fixture(scope="module")
def encode(params):
    """(patches, mask) -> features, pruned in two stages with a fused token."""
    module = pruning_encoder(SparsifyConfig(keep_rate=0.6, stages=(0, 2)))
    return jax.jit(partial(module.apply, {"params": params}))


def test_kept_tokens_are_of_visible_patches(encode):
    mask = mask_from_noise(jnp.asarray(random(2, 3, 16)), 0.4)
    video = encode(random(2, 3, 16, 48), mask)
    assert [p.shape[2] for p in video.stage_patch_ids] == [9, 7, 6]
    np.testing.assert_array_equal(video.stage_patch_ids[0], mask.kept_ids)
    for b, t in np.ndindex(2, 3):
        earlier = [*video.stage_patch_ids[0][b, t].tolist(), NO_PATCH]
        for patch_ids in video.stage_patch_ids[1:]:
            now = patch_ids[b, t].tolist()
            assert set(now) <= set(earlier) and now[-1] == NO_PATCH
            patches = [p for p in now if p != NO_PATCH]
            assert patches == sorted(set(patches))
            earlier = now


def test_images_are_pruned_like_the_frames_of_a_clip(encode):
    patches = random(2, 3, 16, 48)
    mask = mask_from_noise(jnp.asarray(random(2, 3, 16, seed=1)), 0.4)
    images = jax.tree.map(lambda x: x.reshape(6, 1, *x.shape[2:]), (patches, mask))
    alone = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[2:]), encode(*images))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), encode(patches, mask), alone)


@pytest.mark.parametrize(
    ("training", "masked", "counts"),
    [
        (True, True, [5, 3 + 1, 2 + 1]),
        (True, False, [16, 8 + 1, 5 + 1]),
        (False, True, [5, 4 + 1, 4 + 1]),
        (False, False, [16, 12 + 1, 10 + 1]),
    ],
)
def test_pruning_has_a_rate_for_training_and_one_for_evaluation(params, training, masked, counts):
    """The rates hold with and without a mask."""
    rates = SparsifyConfig(keep_rate=0.5, eval_keep_rate=0.75, stages=(0, 2))
    video = dataclasses.replace(SMALL.model.video, depth=3, sparsify=rates)
    model, batch = small_model(video=video).clone(deterministic=not training), random_batch(2)

    def run(model):
        mask = sample_mask(model, batch, jax.random.key(0)) if masked else None
        return model.encode_video(batch.video, mask).stage_patch_ids

    variables = {"params": {"video_encoder": params}}
    stages = jax.eval_shape(lambda: model.apply(variables, method=run))
    assert [patch_ids.shape[2] for patch_ids in stages] == counts
