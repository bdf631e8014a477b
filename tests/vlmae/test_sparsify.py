"""Thinning of tokens against NumPy: counts, scores, selection, a whole encoder."""

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

from vlmae import objectives, sparsify
from vlmae.masking import mask_from_noise
from vlmae.model_config import SparsifyConfig
from vlmae.models.embeddings import sincos_positions
from vlmae.models.layers import Block
from vlmae.models.thinning import ThinningBlock
from vlmae.models.video_encoder import VideoEncoder
from vlmae.sparsify import NO_PLACE

GRID, HEADS = (4, 4), 2


# --- counts


def test_survivors_of_three_stages_with_the_fused_token():
    count, counts = 68, []
    for _ in range(3):
        count = sparsify.num_survivors(count, 0.7) + 1
        counts.append(count)
    assert counts == [49, 36, 27]


@pytest.mark.parametrize(
    ("tokens", "rate", "expected"),
    [(10, 0.7, 7), (20, 0.55, 11), (100, 0.07, 7), (7, 0.5, 4), (5, 1.0, 5), (5, 0.001, 1)],
)
def test_survivors_are_rounded_up_but_not_by_float_error(tokens, rate, expected):
    assert sparsify.num_survivors(tokens, rate) == expected


def test_the_keep_rate_warms_up_in_equal_parts():
    rates = [sparsify.keep_rate_at(step, 0.7, (1.0, 0.9, 0.8), 6) for step in range(8)]
    assert rates == [1.0, 1.0, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7]
    assert sparsify.keep_rate_at(0, 0.7, (), 0) == 0.7


# --- scores


def attention_oracle(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """[f h q k], one head at a time."""
    heads = [
        softmax(np.einsum("fqd,fkd->fqk", query[:, :, h], key[:, :, h]) / math.sqrt(8))
        for h in range(query.shape[2])
    ]
    return np.stack(heads, axis=1)


def test_attention_scores():
    query, key = 2 * random(3, 6, 4, 8), 2 * random(3, 6, 4, 8, seed=1)
    weights = attention_oracle(query, key)
    by_cls = jax.jit(sparsify.cls_attention)(query, key)
    by_all = jax.jit(sparsify.mean_attention)(query, key)
    np.testing.assert_allclose(by_cls, weights.mean(axis=1)[:, 0, 1:], rtol=1e-4)
    np.testing.assert_allclose(by_all, weights.mean(axis=(1, 2))[:, 1:], rtol=1e-4)


def test_norm_and_random_scores_sum_to_one():
    tokens, noise = random(3, 6, 8), np.abs(random(3, 6))
    norms = np.sqrt((tokens**2).sum(axis=-1))
    expected = norms / norms.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(sparsify.norm_score)(tokens), expected, rtol=1e-5)
    expected = noise / noise.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(sparsify.random_score)(noise), expected, rtol=1e-5)


# --- selection


def thin_oracle(tokens, places, scores, keep_rate: float, rest: str):
    """Frame by frame, token by token."""
    new_tokens, new_places = [], []
    for x, place, score in zip(tokens, places, scores, strict=True):
        count = math.ceil(round(len(score) * keep_rate, 6))
        kept = sorted(sorted(range(len(score)), key=lambda j: -score[j])[:count])
        rows, stand = [x[0], *(x[1 + j] for j in kept)], [place[j] for j in kept]
        if rest == "fuse":
            others = set(range(len(score))) - set(kept)
            rows.append(sum(score[j] * x[1 + j] for j in others))
            stand.append(NO_PLACE)
        new_tokens.append(rows)
        new_places.append(stand)
    return np.array(new_tokens), np.array(new_places)


def thin_inputs():
    """Seven tokens in each of three frames; one of each was fused earlier."""
    places = np.stack([np.random.default_rng(i).permutation(16)[:7] for i in range(3)])
    places = np.where(np.arange(7) == 6, NO_PLACE, np.sort(places)).astype(np.int32)
    return random(3, 8, 5), places, softmax(random(3, 7, seed=1))


@pytest.mark.parametrize("rest", ["fuse", "drop"])
@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_thin_against_a_loop(rest, rate):
    inputs = thin_inputs()
    survivors = jax.jit(partial(sparsify.thin, keep_rate=rate, rest=rest))(*inputs)
    tokens, places = thin_oracle(*inputs, rate, rest)
    np.testing.assert_allclose(survivors.tokens, tokens, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(survivors.places, places)


@pytest.mark.parametrize("rest", ["fuse", "drop"])
def test_only_fused_tokens_live_on(rest):
    tokens, places, scores = thin_inputs()

    def total(tokens, places, scores):
        return sparsify.thin(tokens, places, scores, keep_rate=0.5, rest=rest).tokens.sum()

    kept = scores >= np.sort(scores)[:, -4:-3]
    expected = np.where(kept, 1.0, scores if rest == "fuse" else 0.0)
    gradient = np.asarray(jax.jit(jax.grad(total))(tokens, places, scores))
    np.testing.assert_allclose(gradient[:, 1:, 0], expected, rtol=1e-5)
    assert (gradient[:, 0] == 1).all()


def test_keep_rate_one_changes_nothing():
    tokens, places, scores = map(jnp.asarray, thin_inputs())
    survivors = sparsify.thin(tokens, places, scores, keep_rate=1.0, rest="fuse")
    assert survivors.tokens is tokens and survivors.places is places


def test_an_unknown_rest_is_an_error():
    tokens, places, scores = map(jnp.asarray, thin_inputs())
    with pytest.raises(ValueError, match="rest must be fuse or drop, not 'keep'"):
        sparsify.thin(tokens, places, scores, keep_rate=0.5, rest="keep")


# --- blocks and encoders, recomputed step by step from their parameters


def self_attention(x: np.ndarray, p: dict) -> tuple[np.ndarray, np.ndarray]:
    """The tokens after the residual sum, and the attention [f h q k]."""
    y, p = layer_norm(x, p["attention_norm"]), p["attention"]
    heads = (rearrange(dense(y, p[n]), "f q (h d) -> f q h d", h=HEADS) for n in ("query", "key"))
    weights = attention_oracle(*heads)
    value = rearrange(dense(y, p["value"]), "f q (h d) -> f h q d", h=HEADS)
    return x + dense(rearrange(weights @ value, "f h q d -> f q (h d)"), p["out"]), weights


def scores_oracle(name: str, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if name == "norm":
        norms = np.linalg.norm(x[:, 1:], axis=-1)
        return norms / norms.sum(axis=-1, keepdims=True)
    rows = weights[:, :, :1] if name == "cls_attention" else weights
    return rows[..., 1:].mean(axis=(1, 2))


def encoder_oracle(params: dict, x: np.ndarray, config: SparsifyConfig):
    """From embedded tokens to features, and the places after each stage; depth 3."""
    places = np.tile(np.arange(x.shape[1] - 1), (len(x), 1))
    stages = [places]
    for i in range(3):
        layer = params[f"block_{i}"]
        x, weights = self_attention(x, layer)
        if i in config.stages:
            scores = scores_oracle(config.score, x, weights)
            x, places = thin_oracle(x, places, scores, config.keep_rate, config.rest)
            stages.append(places)
        x = x + feed_forward(layer_norm(x, layer["mlp_norm"]), layer["mlp"])
    return layer_norm(x, params["norm"]), stages


def thinning_encoder(config: SparsifyConfig) -> VideoEncoder:
    video = dataclasses.replace(SMALL.model.video, depth=3, sparsify=config)
    return VideoEncoder(video, GRID, config.keep_rate)


@pytest.fixture(scope="module")
def params():
    """Of an encoder of depth 3; the same with thinning and without."""
    module = thinning_encoder(SparsifyConfig())
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
    ],
)
def test_an_encoder_of_two_stages_step_by_step(params, score, rest, counts):
    config = SparsifyConfig(keep_rate=0.6, stages=(0, 1), score=score, rest=rest)
    patches = random(2, 2, 16, 48)
    video = jax.jit(thinning_encoder(config).apply)({"params": params}, patches)
    host = jax.device_get(params)
    x, stages = encoder_oracle(host, embedded(host, patches), config)
    assert [places.shape[2] for places in video.stage_places] == counts
    for ours, theirs in zip(video.stage_places, stages, strict=True):
        np.testing.assert_array_equal(rearrange(ours, "b t m -> (b t) m"), theirs)
    x = rearrange(x, "(b t) q d -> b t q d", b=2)
    np.testing.assert_allclose(video.tokens, x[:, :, 1:], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(video.frame_cls, x[:, :, 0], rtol=1e-3, atol=1e-4)


def test_a_thinning_block_that_keeps_all_is_a_block(params):
    sizes = {"num_heads": HEADS, "mlp_dim": 32, "pre_norm": True, "eps": 1e-6}
    x, places = random(2, 6, 16), np.tile(np.arange(5, dtype=np.int32), (2, 1))
    variables = {"params": params["block_0"]}
    thinned = jax.jit(ThinningBlock(**sizes, keep_rate=1.0).apply)(variables, x, places)
    np.testing.assert_array_equal(thinned.tokens, jax.jit(Block(**sizes).apply)(variables, x))
    np.testing.assert_array_equal(thinned.places, places)


@pytest.fixture(scope="module")
def encode(params):
    """(patches, mask) -> features, thinned in two stages with a fused token."""
    module = thinning_encoder(SparsifyConfig(keep_rate=0.6, stages=(0, 2)))
    return jax.jit(partial(module.apply, {"params": params}))


def test_survivors_stand_at_visible_places(encode):
    mask = mask_from_noise(jnp.asarray(random(2, 3, 16)), 0.4)
    video = encode(random(2, 3, 16, 48), mask)
    assert [p.shape[2] for p in video.stage_places] == [9, 7, 6]
    np.testing.assert_array_equal(video.stage_places[0], mask.kept_ids)
    for b, t in np.ndindex(2, 3):
        earlier = [*video.stage_places[0][b, t].tolist(), NO_PLACE]
        for places in video.stage_places[1:]:
            now = places[b, t].tolist()
            assert set(now) <= set(earlier) and now[-1] == NO_PLACE
            standing = [p for p in now if p != NO_PLACE]
            assert standing == sorted(set(standing))
            earlier = now


def test_images_are_thinned_like_the_frames_of_a_clip(encode):
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
def test_thinning_has_a_rate_for_training_and_one_for_evaluation(params, training, masked, counts):
    """Whether there is a mask or not."""
    rates = SparsifyConfig(keep_rate=0.5, eval_keep_rate=0.75, stages=(0, 2))
    video = dataclasses.replace(SMALL.model.video, depth=3, sparsify=rates)
    model, batch = small_model(video=video).clone(deterministic=not training), random_batch(2)

    def run(model):
        mask = objectives.sample_mask(model, batch, jax.random.key(0)) if masked else None
        return model.encode_video(batch.video, mask).stage_places

    variables = {"params": {"video_encoder": params}}
    stages = jax.eval_shape(lambda: model.apply(variables, method=run))
    assert [places.shape[2] for places in stages] == counts
