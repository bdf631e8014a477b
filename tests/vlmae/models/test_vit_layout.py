"""Options of the published vision transformers' layouts, one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize

from vlmae.config.model import SparsifyConfig, VideoEncoderConfig, VitLayout
from vlmae.config.tree import override
from vlmae.figures.clip_figure import picture_rows, trace
from vlmae.models.embeddings import gather_bias, offset_ids, patchify, unpatchify
from vlmae.models.video_encoder import VideoEncoder
from vlmae.models.video_language import build_model
from vlmae.ops import token_pruning
from vlmae.ops.token_pruning import NO_PATCH
from vlmae.training.objectives import compute_losses

VIDEOMAE = {
    "model.video.positions": "sincos_clip",
    "model.video.layout": VitLayout(cls_token=False, frame_cls="mean", tubelet=2, joint=True),
}


def test_biases_are_those_between_the_visible_patches():
    """Compares with the whole matrix, entry by entry; a fused token has none."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5 * 7 + 3, 2)).astype("float32")  # a grid of 3 x 4
    patch_ids = np.array([[0, 5, 11], [7, 2, NO_PATCH]])
    found = np.asarray(gather_bias(jnp.asarray(table), (3, 4), jnp.asarray(patch_ids)))
    assert found.shape == (2, 2, 4, 4)
    for f, row in enumerate(patch_ids):
        for q, query in enumerate([None, *row]):
            for k, key in enumerate([None, *row]):
                np.testing.assert_array_equal(found[f, :, q, k], bias_between(table, query, key))


def bias_between(table: np.ndarray, query: int | None, key: int | None) -> np.ndarray:
    """BEiT's rule for two patches of the 3 x 4 grid; None is [CLS]."""
    if NO_PATCH in (query, key):
        return np.zeros(2)
    if query is None or key is None:
        return table[-1 if query == key else -3 if query is None else -2]
    dy, dx = (a - b for a, b in zip(divmod(query, 4), divmod(key, 4), strict=True))
    return table[(dy + 2) * 7 + dx + 3]


def test_every_offset_has_an_entry_of_its_own():
    ids = offset_ids(3, 4)
    assert sorted(set(ids.ravel().tolist())) == list(range(5 * 7 + 3))


def test_scores_of_tokens_know_the_bias():
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.normal(size=(2, 5, 3, 4)), "float32") for _ in range(2))
    bias = rng.normal(size=(2, 3, 5, 5)).astype("float32")
    logits = np.einsum("fqhd,fkhd->fhqk", query, key) / 2 + bias
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    by_cls = token_pruning.cls_attention(query, key, jnp.asarray(bias))
    np.testing.assert_allclose(by_cls, weights[:, :, 0, 1:].mean(axis=1), atol=1e-6)
    by_all = token_pruning.mean_attention(query, key, jnp.asarray(bias))
    np.testing.assert_allclose(by_all, weights[..., 1:].mean(axis=(1, 2)), atol=1e-6)


def test_pruning_and_biases_go_together():
    layout = VitLayout(relative_bias="shared", frame_cls="mean", layer_scale=0.1)
    pruning = SparsifyConfig(keep_rate=0.5, eval_keep_rate=0.5, stages=(0, 1))
    config = VideoEncoderConfig(16, 3, 2, 32, 4, "none", layout, sparsify=pruning)
    encoder, patches = VideoEncoder(config, (3, 3), keep_rate=0.5), random_patches(9)
    params = randomize(encoder.init(jax.random.key(0), patches)["params"], 0)
    assert params["relative_bias"]["shared"].shape == (5 * 5 + 3, 2)
    assert "positions" not in params and params["block_1"]["mlp_scale"].shape == (16,)
    apply = jax.jit(lambda p: encoder.apply({"params": p}, patches))
    features = apply(params)
    assert [patch_ids.shape[2] for patch_ids in features.stage_patch_ids] == [9, 6, 4]
    without = {**params, "relative_bias": {"shared": jnp.zeros((28, 2))}}
    assert np.abs(apply(without).frame_cls - features.frame_cls).max() > 1e-3


def random_patches(count: int, frames: int = 2, pixels: int = 48) -> jax.Array:
    values = np.random.default_rng(2).normal(size=(2, frames, count, pixels))
    return jnp.asarray(values, "float32")


@pytest.mark.parametrize("joint", [True, False])
def test_only_joint_attention_sees_other_frames(joint):
    layout = VitLayout(cls_token=False, frame_cls="mean", joint=joint)
    config = VideoEncoderConfig(16, 1, 2, 32, 4, "sincos_clip", layout)
    encoder, patches = VideoEncoder(config, (3, 3)), random_patches(9)
    params = encoder.init(jax.random.key(0), patches)
    apply = jax.jit(encoder.apply)
    before = apply(params, patches).tokens
    after = apply(params, patches.at[:, 1].add(1.0)).tokens
    assert bool(jnp.allclose(before[:, 0], after[:, 0])) != joint
    assert not jnp.allclose(before[:, 1], after[:, 1])


def test_a_tubelet_is_cut_and_put_together():
    video = np.random.default_rng(3).normal(size=(2, 4, 8, 12, 3)).astype("float32")
    patches = np.asarray(patchify(jnp.asarray(video), 4, tubelet=2))
    assert patches.shape == (2, 2, 6, 2 * 48)
    np.testing.assert_array_equal(patches[0, 1, 5, 48:], video[0, 3, 4:, 8:].ravel())
    np.testing.assert_array_equal(unpatchify(patches, 4, rows=2, tubelet=2), video)
    image = np.asarray(patchify(jnp.asarray(video[:, :1]), 4, tubelet=2))
    np.testing.assert_array_equal(image[..., :48], image[..., 48:])
    with pytest.raises(ValueError, match="clips of 3 frames do not divide into tubelets of 2"):
        patchify(jnp.asarray(video[:, :3]), 4, tubelet=2)


def test_clips_of_tubelets_are_trained_and_pictured():
    """All objectives over joint tubelets; each picture shows the first frame of a tubelet."""
    config, batch = override(SMALL, VIDEOMAE), random_batch(frames=4)
    model = build_model(config, deterministic=False)
    params = init_params(model, batch, config.objectives)
    assert params["pixel_decoder"]["pixels"]["kernel"].shape == (16, 2 * 48)
    key = jax.random.key(0)

    def run(params):
        rngs = {"dropout": key, "noise": key}
        args = (batch, key, config.objectives)
        return model.apply({"params": params}, *args, method=compute_losses, rngs=rngs)[0]

    value, gradients = jax.jit(jax.value_and_grad(run))(params)
    assert np.isfinite(value) and np.abs(gradients["video_encoder"]["patch_embed"]["kernel"]).any()
    rows = dict(picture_rows(config, trace(config, params, batch)))
    assert rows["frames"].shape == (6, 2, 16, 16, 3)
    np.testing.assert_array_equal(rows["frames"], batch.video[:, ::2])


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"cls_token": False}, "--cls-token=False goes with --frame-cls=mean"),
        ({"joint": True}, "--joint needs --cls-token=False"),
        ({"extra_tokens": 1, "relative_bias": "layer"}, "not with --extra-tokens"),
        ({"tubelet": 0}, "--tubelet"),
        ({"pixel_std": (0.0, 1.0, 1.0)}, "--pixel-std.0"),
    ],
)
def test_layouts_that_no_model_has(layout, said):
    with pytest.raises(ValueError, match=said):
        VitLayout(**layout)


def test_layouts_that_do_not_go_with_the_rest():
    joint = VIDEOMAE["model.video.layout"]
    pruning = SparsifyConfig(keep_rate=0.5)
    for changes, said in (
        ({"sparsify": pruning}, "--sparsify.keep-rate"),
        ({"frames_per_chunk": 2}, "--frames-per-chunk"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(VideoEncoderConfig(layout=joint), **changes)
