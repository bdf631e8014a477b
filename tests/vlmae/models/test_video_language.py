"""The model: its receptive fields, inputs that must change nothing, its parts against oracles."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLS, FIRST_WORD, PAD, SMALL, VOCAB, init_params, random_batch, randomize
from helpers import small_model as make_model

from vlmae.config.experiment import ObjectivesConfig
from vlmae.config.model import VitLayout
from vlmae.config.tree import override
from vlmae.models.embeddings import (
    denormalize_pixels,
    normalize_pixels,
    patchify,
    sincos_positions,
    unpatchify,
)
from vlmae.models.video_encoder import VideoEncoder
from vlmae.ops.masking import PatchMask, mask_from_noise

GRID = (4, 4)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# --- patches and positions


def test_patchify_against_a_loop():
    video = np.asarray(random(2, 3, 8, 12, 3))
    patches = np.asarray(patchify(jnp.asarray(video), 4))
    assert patches.shape == (2, 3, 6, 48)
    for n, (y, x) in enumerate((y, x) for y in range(2) for x in range(3)):
        patch = video[:, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        np.testing.assert_array_equal(patches[:, :, n], patch.reshape(2, 3, 48))


@pytest.mark.parametrize(("count", "gathers"), [(16, False), (7, True)])
def test_positions_are_gathered_only_under_a_mask(count, gathers):
    """Without one the ids are constants, and XLA would make them a constant as large as a batch."""
    encoder = VideoEncoder(SMALL.model.video, GRID)
    ids = jnp.broadcast_to(jnp.arange(count), (6, 2, count))
    params = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((6, 2, 16, 48)))
    mask = PatchMask(ids, jnp.zeros((6, 2, 16), bool)) if count < 16 else None
    program = jax.make_jaxpr(encoder.apply)(params, jnp.zeros((6, 2, 16, 48)), mask)
    assert ("gather[" in str(program)) == gathers


def test_unpatchify_is_the_inverse_of_patchify():
    video = random(2, 3, 8, 12, 3)
    patches = np.asarray(patchify(video, 4))
    np.testing.assert_array_equal(unpatchify(patches, 4, rows=2), video)


def test_frames_that_do_not_divide_into_patches_are_an_error():
    with pytest.raises(ValueError, match="frames of 8x10 do not divide into patches of 4"):
        patchify(jnp.zeros((1, 1, 8, 10, 3)), 4)


def test_pixels_are_normalized_and_back():
    pixels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    normalized = np.asarray(normalize_pixels(jnp.asarray(pixels), VitLayout()))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, (pixels / 255 - mean) / deviation, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(denormalize_pixels(normalized, VitLayout()), pixels)


def test_sincos_positions_against_the_formula():
    rows, cols, width = 3, 5, 8
    table = sincos_positions(rows, cols, width)
    for y in range(rows):
        for x in range(cols):
            expected = []
            for place in (x, y):
                angles = [place / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(table[y * cols + x], expected, atol=1e-6)


def test_sincos_positions_need_a_width_divisible_by_four():
    with pytest.raises(ValueError, match="divisible by 4, not 10"):
        sincos_positions(2, 2, 10)


# --- the video encoder


@pytest.fixture(scope="module")
def encoder():
    module = VideoEncoder(SMALL.model.video, GRID)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 16, 48)))["params"]
    return module, {"params": randomize(params)}


@pytest.fixture(scope="module")
def encode(encoder):
    """(patches, mask or None) -> features, compiled once for each shape."""
    return jax.jit(partial(encoder[0].apply, encoder[1]))


def test_a_removed_patch_has_no_gradient_into_the_encoder(encoder):
    module, variables = encoder
    patches, mask = random(2, 3, 16, 48), mask_from_noise(random(2, 3, 16, seed=1), 0.65)

    @jax.jit
    def gradient(patches):
        def loss(patches):
            video = module.apply(variables, patches, mask)
            return (video.tokens**2).sum() + (video.frame_cls**2).sum()

        return jax.grad(loss)(patches)

    reached = np.asarray(gradient(patches) != 0)
    np.testing.assert_array_equal(reached.any(axis=-1), ~mask.removed_mask)
    np.testing.assert_array_equal(reached.all(axis=-1), ~mask.removed_mask)


def test_features_say_where_their_tokens_stand(encode):
    mask = mask_from_noise(random(2, 3, 16, seed=1), 0.65)
    video = encode(random(2, 3, 16, 48), mask)
    assert video.tokens.shape == (2, 3, 5, 16) and video.frame_cls.shape == (2, 3, 16)
    np.testing.assert_array_equal(video.patch_ids, mask.kept_ids)
    np.testing.assert_array_equal(video.removed_mask, mask.removed_mask)


def test_ratio_zero_and_no_mask_keep_every_patch(encode):
    patches, mask = random(2, 3, 16, 48), mask_from_noise(random(2, 3, 16, seed=1), 0.0)
    masked, plain = encode(patches, mask), encode(patches)
    np.testing.assert_array_equal(plain.patch_ids, np.broadcast_to(np.arange(16), (2, 3, 16)))
    assert not plain.removed_mask.any()
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), masked, plain)


def test_the_content_of_removed_patches_and_other_frames_changes_nothing(encode):
    patches, mask = random(2, 3, 16, 48), mask_from_noise(random(2, 3, 16, seed=1), 0.65)
    noisy = jnp.where(mask.removed_mask[..., None], 1e3, patches)
    noisy = noisy.at[:, 1].add(1.0)
    before, after = encode(patches, mask), encode(noisy, mask)
    np.testing.assert_array_equal(before.tokens[:, ::2], after.tokens[:, ::2])
    assert (before.tokens[:, 1] != after.tokens[:, 1]).all()


def test_images_are_encoded_like_the_frames_of_a_clip(encode):
    patches = random(2, 3, 16, 48)
    clip, images = encode(patches), encode(patches.reshape(6, 1, 16, 48))
    np.testing.assert_allclose(clip.tokens, images.tokens.reshape(2, 3, 16, 16), atol=1e-5)
    np.testing.assert_allclose(clip.frame_cls, images.frame_cls.reshape(2, 3, 16), atol=1e-5)


def test_positions_of_the_visible_patches_matter(encode):
    patches = random(1, 1, 16, 48)
    swapped = patches[:, :, np.r_[1, 0, 2:16]]
    assert np.abs(encode(patches).frame_cls - encode(swapped).frame_cls).max() > 1e-3


def test_learned_positions(encoder, encode):
    config = dataclasses.replace(SMALL.model.video, positions="learned")
    module, patches = VideoEncoder(config, GRID), random(1, 1, 16, 48)
    shapes = jax.eval_shape(module.init, jax.random.key(0), patches)["params"]
    assert shapes["positions"].shape == (17, 16)  # [CLS] has one
    params = {
        **encoder[1]["params"],
        "positions": jnp.asarray(np.pad(sincos_positions(*GRID, 16), ((1, 0), (0, 0)))),
    }
    learned = jax.jit(module.apply)({"params": params}, patches)
    np.testing.assert_allclose(learned.tokens, encode(patches).tokens, atol=1e-6)


# --- the text encoder and the heads


@pytest.fixture(scope="module")
def model():
    """The small model with noise on every parameter: (module, variables)."""
    module = make_model()
    params = jax.jit(partial(init_params, module))(random_batch())
    return module, {"params": randomize(params)}


@pytest.fixture(scope="module")
def encode_text(model):
    module, variables = model
    return jax.jit(partial(module.apply, variables, method="encode_text"))


def test_padding_changes_no_text_feature(encode_text):
    ids = np.random.default_rng(0).integers(FIRST_WORD, VOCAB, (3, 6), dtype=np.int32)
    lengths = np.array([6, 4, 1])
    mask = np.arange(6) < lengths[:, None]
    short = encode_text(ids, mask)
    garbage = encode_text(np.where(mask, ids, (ids + 1) % VOCAB), mask)
    longer = encode_text(np.pad(ids, ((0, 0), (0, 5))), np.pad(mask, ((0, 0), (0, 5))))
    np.testing.assert_array_equal(short.lengths, lengths)
    for row, length in enumerate(lengths):
        expected = short.tokens[row, :length]
        np.testing.assert_array_equal(garbage.tokens[row, :length], expected)
        np.testing.assert_allclose(longer.tokens[row, :length], expected, atol=1e-5)


def test_every_word_of_a_text_matters(encode_text):
    ids = np.random.default_rng(0).integers(FIRST_WORD, VOCAB, (1, 6), dtype=np.int32)
    mask = np.arange(6)[None] < 4
    plain = encode_text(ids, mask)
    for place in range(4):
        changed = encode_text(np.where(np.arange(6) == place, PAD, ids), mask)
        assert np.abs(changed.cls - plain.cls).max() > 1e-4, place


def test_padding_words_change_no_fused_feature(model):
    module, variables = model
    batch = random_batch(3)

    @jax.jit
    def fuse(ids):
        def run(module):
            text = module.encode_text(ids, batch.text_mask)
            return module.fuse(module.encode_video(batch.video), text)

        return module.apply(variables, method=run)

    fused = fuse(batch.text_ids)
    garbage = fuse(np.where(batch.text_mask, batch.text_ids, CLS))
    assert (~batch.text_mask).any()
    np.testing.assert_array_equal(fused[batch.text_mask], garbage[batch.text_mask])


def test_dropout_works_in_training_only(model):
    ids, mask = random_batch(2).text_ids, random_batch(2).text_mask
    for deterministic in (True, False):
        module = make_model().clone(deterministic=deterministic)
        encode = jax.jit(partial(module.apply, model[1], method="encode_text"))
        one, other = (encode(ids, mask, rngs={"dropout": jax.random.key(i)}) for i in range(2))
        assert (one.tokens == other.tokens).all() == deterministic


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_embeddings_are_unit_vectors_in_the_direction_of_the_projection(model, pooling):
    module, variables = model
    module = module.clone(config=override(module.config, {"text.pooling": pooling}))
    batch = random_batch(3)

    def run(module):
        video = module.encode_video(batch.video)
        text = module.encode_text(batch.text_ids, batch.text_mask)
        embeddings = {"video": module.embed_video(video), "text": module.embed_text(text)}
        return embeddings, video.frame_cls, text.tokens

    embeddings, frames, words = jax.jit(partial(module.apply, variables, method=run))()
    assert embeddings["video"].shape == (3, 2, 8) and embeddings["text"].shape == (3, 8)
    lengths = batch.text_mask.sum(axis=1)
    assert lengths.min() < lengths.max()
    means = np.stack(
        [row[:length].mean(axis=0) for row, length in zip(words, lengths, strict=True)]
    )
    pooled = {"video": frames, "text": means if pooling == "mean" else words[:, 0]}
    for name, actual in embeddings.items():
        dense = variables["params"][f"{name}_projection"]["dense"]
        expected = np.asarray(pooled[name]) @ dense["kernel"] + dense["bias"]
        expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_matching_reads_the_fused_cls(model):
    module, variables = model
    fused, head = random(3, 8, 16), variables["params"]["match_head"]
    expected = np.asarray(fused)[:, 0] @ head["kernel"] + head["bias"]
    actual = module.apply(variables, fused, method="match")
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_the_temperature_is_clamped_but_not_its_gradient():
    def temperature(value):
        return make_model().apply({"params": {"temperature": value}}, method="temperature")

    for value, clamped in ((0.2, 0.2), (-1.0, 0.001), (3.0, 0.5), (0.001, 0.001), (0.5, 0.5)):
        found, gradient = jax.value_and_grad(temperature)(jnp.asarray(value))
        assert float(found) == pytest.approx(clamped) and gradient == 1


def test_frames_of_another_size_are_an_error(model):
    module, variables = model
    with pytest.raises(ValueError, match=r"frames of \(12, 16\), but image_size is 16"):
        module.apply(variables, jnp.zeros((1, 1, 12, 16, 3), jnp.uint8), method="patches")


# --- which parameters exist

ALL_PARTS = {
    "video_encoder",
    "text_encoder",
    "video_projection",
    "text_projection",
    "temperature",
    "fusion",
    "match_head",
    "word_transform",
    "word_bias",
    "pixel_decoder",
}
ENCODERS = {"video_encoder", "text_encoder"}
CONTRASTIVE = {"video_projection", "text_projection", "temperature"}


@pytest.mark.parametrize(
    ("off", "parts"),
    [
        ((), ALL_PARTS),
        (("mvm",), ALL_PARTS - {"pixel_decoder"}),
        (("vtm", "mlm", "mvm"), ENCODERS | CONTRASTIVE),
        (("vtc", "vtm", "mlm"), ENCODERS | {"pixel_decoder"}),
        (("vtc", "mlm", "mvm"), ENCODERS | {"fusion", "match_head"}),
    ],
)
def test_only_the_objectives_in_use_have_parameters(off, parts):
    objectives = dataclasses.replace(ObjectivesConfig(), **dict.fromkeys(off, 0.0))
    shapes = jax.eval_shape(lambda: init_params(make_model(), random_batch(), objectives))
    assert set(shapes) == parts
