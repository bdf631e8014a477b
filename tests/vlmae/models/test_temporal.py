"""Time in the video encoder: embeddings that start at zero, attention across frames at a patch."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, random_batch, randomize, small_model
from oracles import random

from vlmae.config.model import MaskConfig, SparsifyConfig, VideoEncoderConfig
from vlmae.models.temporal import Temporal
from vlmae.models.video_encoder import VideoEncoder
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops.token_pruning import NO_PATCH
from vlmae.training.features import sample_mask

KEY = jax.random.key(5)
GRID = (4, 4)


def with_time(**changes) -> VideoEncoderConfig:
    return dataclasses.replace(SMALL.model.video, **changes)


@pytest.fixture(scope="module")
def timed():
    """Parameters of an encoder with temporal embeddings and a temporal block, as initialized."""
    module = VideoEncoder(with_time(time_frames=3, time_depth=1), GRID)
    return jax.jit(module.init)(KEY, jnp.zeros((1, 3, 16, 48)))["params"]


@pytest.fixture(scope="module")
def encode():
    """(config, params, patches) -> features, compiled once for each config and shape."""

    @partial(jax.jit, static_argnums=0)
    def run(config, params, patches):
        return VideoEncoder(config, GRID).apply({"params": params}, patches)

    return run


def test_temporal_embeddings_change_nothing_at_the_start_and_show_the_order_later(timed, encode):
    plain, embedded = with_time(), with_time(time_frames=3)
    patches = random(2, 3, 16, 48)
    without = encode(plain, timed, patches)
    start = encode(embedded, timed, patches)
    jax.tree.map(np.testing.assert_array_equal, start, without)
    assert (encode(plain, timed, patches[:, ::-1]).frame_cls == without.frame_cls[:, ::-1]).all()

    table = random(3, 16)
    later = {**timed, "temporal": {**timed["temporal"], "embedding": table}}
    forward = encode(embedded, later, patches)
    for name in ("tokens", "frame_cls"):
        offset = np.asarray(getattr(forward, name) - getattr(without, name))
        rows = table.reshape(1, 3, *(1,) * (offset.ndim - 3), 16)
        np.testing.assert_allclose(offset, np.broadcast_to(rows, offset.shape), atol=1e-5)
    backward = encode(embedded, later, patches[:, ::-1])
    assert np.abs(backward.frame_cls[:, ::-1] - forward.frame_cls).max() > 0.1


def test_temporal_embeddings_may_start_from_sines_and_cosines():
    module = Temporal(with_time(time_frames=3, time_init="sincos"))
    tokens, patch_ids = jnp.zeros((1, 3, 2, 16)), jnp.zeros((1, 3, 2), jnp.int32)
    moved, variables = module.init_with_output(KEY, tokens, patch_ids, True)
    angles = np.arange(3)[:, None] / 10000 ** (np.arange(8) / 8)
    expected = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(3, 16)
    np.testing.assert_allclose(variables["params"]["embedding"], expected, atol=1e-6)
    np.testing.assert_allclose(moved[0, :, 0], expected, atol=1e-6)


def test_the_temporal_table_is_interpolated():
    def resize(table: np.ndarray, length: int) -> jax.Array:
        """Adds the table to clips of zeros, `length` frames long."""
        module, zeros = Temporal(with_time(time_frames=len(table))), jnp.zeros
        tokens = zeros((1, length, 1, table.shape[1]))
        ids = zeros((1, length, 1), jnp.int32)
        return module.apply({"params": {"embedding": table}}, tokens, ids, True)[0, :, 0]

    table = random(4, 3)
    np.testing.assert_array_equal(resize(table, 4), table)
    ramp = np.arange(4, dtype=np.float32)[:, None]
    for length in (2, 3, 7, 12):
        np.testing.assert_allclose(resize(np.ones((4, 3), np.float32), length), 1, rtol=1e-6)
        resized = np.asarray(resize(ramp, length))[:, 0]
        assert (np.diff(resized) >= 0).all() and resized[-1] > resized[0]
        np.testing.assert_allclose(resized + resized[::-1], 3, rtol=1e-5)


def test_images_bypass_time(timed, encode):
    timeless = {name: x for name, x in timed.items() if name != "temporal"}
    images = random(4, 1, 16, 48)
    config = with_time(time_frames=3, time_depth=1)
    jax.tree.map(
        np.testing.assert_array_equal,
        encode(config, timeless, images),
        encode(with_time(), timeless, images),
    )


@pytest.fixture(scope="module")
def temporal():
    """(tokens, patch_ids, aligned) -> tokens, with noise on every parameter."""
    module = Temporal(with_time(time_frames=2, time_depth=1))
    tokens, patch_ids = jnp.zeros((1, 2, 3, 16)), jnp.zeros((1, 2, 3), jnp.int32)
    init = jax.jit(module.init, static_argnums=3)
    variables = randomize(init(KEY, tokens, patch_ids, True))
    return jax.jit(partial(module.apply, variables), static_argnums=2)


def test_equal_patch_ids_may_be_aligned_or_masked(temporal):
    tokens, patch_ids = random(2, 3, 4, 16), np.tile(np.arange(4), (2, 3, 1))
    aligned, masked = temporal(tokens, patch_ids, True), temporal(tokens, patch_ids, False)
    np.testing.assert_allclose(aligned, masked, rtol=1e-4, atol=1e-5)
    assert np.abs(aligned - tokens).max() > 0.1


def test_a_token_reads_its_own_patch_only(temporal):
    """Fused tokens read each other."""
    patch_ids = np.array([[[16, 0, 3, NO_PATCH], [16, 3, 5, NO_PATCH], [16, 0, 3, 9]]])
    tokens, direction = random(1, 3, 4, 16), random(16, seed=1)

    def outputs(tokens):
        return (temporal(tokens, jnp.asarray(patch_ids), False) @ direction).ravel()

    influence = jax.jit(jax.jacrev(outputs))(tokens).reshape(12, 12, 16)
    flat = patch_ids.ravel()
    np.testing.assert_array_equal((influence != 0).any(axis=-1), flat[:, None] == flat[None])


@pytest.mark.parametrize(
    ("scheme", "keep_rate", "expected"),
    [("tube", 1.0, True), ("none", 1.0, True), ("random", 1.0, False), ("tube", 0.5, False)],
)
def test_only_frames_of_equal_patch_ids_are_aligned(monkeypatch, scheme, keep_rate, expected):
    """The cheaper path is for tubes and whole frames; pruning ends that."""
    promised = []

    def call(self, tokens, patch_ids, aligned):
        promised.append(aligned)
        return tokens

    monkeypatch.setattr(Temporal, "__call__", call)
    mask = MaskConfig("random" if scheme == "none" else scheme, ratio=0.5)
    pruning = SparsifyConfig(eval_keep_rate=keep_rate, stages=(0,))
    model = small_model(video=with_time(time_depth=1, mask=mask, sparsify=pruning))
    batch = random_batch(2)

    def run(model: VideoLanguageModel):
        patches = None if scheme == "none" else sample_mask(model, batch, KEY)
        return model.encode_video(batch.video, patches).patch_ids

    jax.eval_shape(lambda: model.init(KEY, method=run))
    assert promised == [expected]


def test_cls_and_fused_tokens_have_ids_of_their_own(monkeypatch):
    """[CLS] attends to [CLS] of other frames, fused tokens to fused ones, neither to a patch."""
    given = []

    def call(self, tokens, patch_ids, aligned):
        given.append(patch_ids)
        return tokens

    monkeypatch.setattr(Temporal, "__call__", call)
    pruning = SparsifyConfig(eval_keep_rate=0.5, stages=(0,))
    model, batch = small_model(video=with_time(time_depth=1, sparsify=pruning)), random_batch(2)

    def run(model: VideoLanguageModel):
        return model.encode_video(batch.video).patch_ids

    kept, ids = jax.jit(lambda: (model.init_with_output(KEY, method=run)[0], given[-1]))()
    assert (ids[..., 0] == 16).all() and (ids[..., -1] == NO_PATCH).all()
    np.testing.assert_array_equal(ids[..., 1:], kept)
    assert ((kept[..., :-1] >= 0) & (kept[..., :-1] < 16)).all()
