"""The objectives on whole batches: padding rows, negatives, compute types, recomputation."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLS, MASK, SMALL, VOCAB, init_params, random_batch, randomize, small_model

from vlmae.config.model import MaskConfig
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops import losses
from vlmae.runs.metric_registry import metric_of
from vlmae.training import objectives
from vlmae.training.features import Context, Features, extract, keys_of, sample_mask
from vlmae.training.gradients import loss_gradients
from vlmae.training.pairs import Embeddings, contrast, embed, fuse_pairs, vtc_logits

NAMES = ("vtc", "vtm", "mlm", "mvm")
KEY = jax.random.key(5)
KEYS = keys_of(KEY)


@pytest.fixture(scope="module")
def params():
    return randomize(jax.jit(partial(init_params, small_model()))(random_batch()))


@pytest.fixture(scope="module")
def gradients(params):
    """batch -> (gradients, metrics) of the whole loss, without dropout, compiled once."""
    step = partial(loss_gradients, model=small_model(), objectives=SMALL.objectives, shards=1)
    return jax.jit(lambda batch: step(params, batch, KEY))


def with_padding(rows: list[int]):
    """A random batch of six in which the given rows are padding, by flag only."""
    batch = random_batch()
    return batch._replace(valid=~jnp.isin(jnp.arange(6), jnp.array(rows)))


def test_the_total_is_the_weighted_sum(gradients):
    _, metrics = gradients(random_batch())
    assert all(metric_of(name) for name in metrics), "all are registered"
    expected = sum(getattr(SMALL.objectives, n) * metrics[f"loss/{n}"] for n in NAMES)
    np.testing.assert_allclose(metrics["loss/total"], expected, rtol=1e-6)
    assert metrics["tokens/video_kept"] == 2 * 5
    np.testing.assert_allclose(metrics["tokens/text"], random_batch().text_mask.sum() / 6)


def test_every_parameter_gets_a_gradient(gradients):
    grads, _ = gradients(random_batch())
    names = {
        jax.tree_util.keystr(path): float(jnp.abs(g).max())
        for path, g in jax.tree.leaves_with_path(grads)
    }
    # A bias of the keys shifts all scores of a query alike, and the softmax forgets it.
    silent = [n for n, size in names.items() if size == 0 and not n.endswith("['key']['bias']")]
    assert not silent


def test_the_content_of_padding_rows_changes_no_loss_and_no_gradient(gradients):
    batch, other = with_padding([1, 4]), random_batch(seed=9)
    padding = ~batch.valid
    garbage = batch._replace(
        video=np.where(padding[:, None, None, None, None], other.video, batch.video),
        text_ids=np.where(padding[:, None], other.text_ids, batch.text_ids),
        text_mask=np.where(padding[:, None], False, batch.text_mask),
        media_ids=np.where(padding, batch.media_ids[0], batch.media_ids),
    )
    expected, actual = gradients(batch), gradients(garbage)
    assert float(expected[1]["data/bad_ratio"]) == pytest.approx(2 / 6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)
    assert float(gradients(random_batch())[1]["loss/total"]) != expected[1]["loss/total"]


def test_a_batch_of_padding_has_no_loss_and_finite_gradients(gradients):
    grads, metrics = gradients(with_padding(list(range(6))))
    assert [float(metrics[f"loss/{name}"]) for name in NAMES] == [0, 0, 0, 0]
    assert not any(g.any() for g in jax.tree.leaves(grads))


def features_of(model: VideoLanguageModel, batch, config=SMALL.objectives) -> Features:
    """All that the objectives read of a batch."""
    features = extract(model, batch, KEYS, config)
    return fuse_pairs(model, features, Context(batch, KEY, config))


def apply(params, run, model: VideoLanguageModel | None = None):
    """run(bound model), compiled."""
    model = model or small_model()
    return jax.jit(lambda params: model.apply({"params": params}, method=run))(params)


@pytest.mark.parametrize("name", ["vtc", "mvm"])
def test_padding_rows_count_like_rows_that_are_not_there(params, name):
    batch = with_padding([1, 4])
    rows = jnp.flatnonzero(batch.valid)

    def run(model: VideoLanguageModel):
        features = extract(model, batch, KEYS, SMALL.objectives)
        objective = objectives.FUNCTIONS[name]
        fewer, fewer_rows = jax.tree.map(lambda x: x[rows], (features, batch))
        whole, part = (Context(x, KEY, SMALL.objectives) for x in (batch, fewer_rows))
        return objective(model, features, whole), objective(model, fewer, part)

    padded, fewer = apply(params, run)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), padded, fewer)


def test_matching_pairs_every_row_with_itself_and_two_negatives(params):
    """Of two valid rows, each is the other's only negative: four wrong pairs and two right ones."""
    batch = random_batch(3)._replace(valid=jnp.array([True, True, False]))

    def run(model: VideoLanguageModel):
        features = features_of(model, batch)
        loss = objectives.vtm(model, features, Context(batch, KEY, SMALL.objectives)).value
        texts, videos = jnp.array([0, 1, 0, 1]), jnp.array([0, 1, 1, 0])
        fused = model.fuse(
            jax.tree.map(lambda x: x[videos], features.video),
            jax.tree.map(lambda x: x[texts], features.text),
        )
        return loss, jax.nn.log_softmax(model.match(fused))

    loss, log_p = apply(params, run)
    right, wrong = log_p[:2, 1], log_p[2:, 0]
    np.testing.assert_allclose(loss, -(right.sum() + 2 * wrong.sum()) / 6, rtol=1e-5)


def test_matching_without_any_negative_counts_the_positives(params):
    batch = random_batch(3)._replace(media_ids=jnp.zeros(3, jnp.int32))

    def run(model: VideoLanguageModel):
        features = features_of(model, batch)
        loss = objectives.vtm(model, features, Context(batch, KEY, SMALL.objectives)).value
        return loss, jax.nn.log_softmax(model.match(model.fuse(features.video, features.text)))

    loss, log_p = apply(params, run)
    np.testing.assert_allclose(loss, -log_p[:, 1].mean(), rtol=1e-5)


def test_word_modeling_predicts_hidden_words_of_valid_rows(params, monkeypatch):
    """With every maskable word hidden behind [MASK]: the loss, from the parts of the model."""
    batch, options = with_padding([1, 4]), {}

    def hide_all(key, ids, maskable, **given):
        options.update(given)
        return losses.MaskedTokens(jnp.where(maskable, MASK, ids), maskable)

    monkeypatch.setattr(losses, "mask_tokens", hide_all)

    def run(model: VideoLanguageModel):
        features = features_of(model, batch)
        loss = objectives.mlm(model, features, Context(batch, KEY, SMALL.objectives))
        text = model.encode_text(jnp.where(maskable, MASK, batch.text_ids), batch.text_mask)
        return loss, model.predict_words(model.fuse(features.video, text))

    maskable = batch.text_mask & batch.valid[:, None] & (batch.text_ids != CLS)
    loss, logits = apply(params, run)
    assert options == {"ratio": 0.5, "mask_id": MASK, "vocab_size": VOCAB}
    log_p = np.asarray(jax.nn.log_softmax(logits))
    hidden = [(b, i, batch.text_ids[b, i]) for b, i in np.argwhere(maskable)]
    np.testing.assert_allclose(loss.value, -np.mean([log_p[place] for place in hidden]), rtol=1e-5)
    right = [logits[b, i].argmax() == word for b, i, word in hidden]
    np.testing.assert_allclose(loss.metrics["mlm/accuracy"], np.mean(right), rtol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_pixel_modeling_reconstructs_the_removed_patches(params, normalize):
    batch = random_batch(2)
    decoder = dataclasses.replace(SMALL.model.pixel_decoder, normalize_target=normalize)

    def run(model: VideoLanguageModel):
        features = features_of(model, batch)
        loss = objectives.mvm(model, features, Context(batch, KEY, SMALL.objectives)).value
        pixels = model.decode_pixels(features.video).pixels
        return loss, pixels, model.patches(batch.video), features.video.removed_mask

    loss, pixels, target, removed = map(
        np.asarray, apply(params, run, small_model(pixel_decoder=decoder))
    )
    if normalize:
        target = target - target.mean(axis=-1, keepdims=True)
        target /= np.sqrt((target**2).sum(axis=-1, keepdims=True) / 47 + 1e-6)
    np.testing.assert_allclose(loss, ((pixels - target)[removed] ** 2).mean(), rtol=1e-5)


def test_contrastive_logits_are_mean_frame_similarities_over_the_temperature(params):
    batch = random_batch(3)

    def run(model: VideoLanguageModel):
        features = extract(model, batch, KEYS, SMALL.objectives)
        logits = vtc_logits(embed(model, features, SMALL.objectives))
        loss = objectives.vtc(model, features, Context(batch, KEY, SMALL.objectives))
        return loss, logits, model.embed_video(features.video), model.embed_text(features.text)

    loss, logits, video, text = apply(params, run)
    expected = np.einsum("ite,je->ij", video, text) / 2 / params["temperature"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    accuracy = (np.asarray(logits).argmax(axis=1) == np.arange(3)).mean()
    np.testing.assert_allclose(loss.metrics["vtc/accuracy"], accuracy, rtol=1e-6)


def test_contrast_neither_asks_nor_answers_with_padding():
    """A padding row whose text fits every clip best, and a clip with two captions."""
    batch = random_batch(4)._replace(
        media_ids=jnp.array([7, 7, 8, 9]), valid=jnp.array([True, True, True, False])
    )
    logits = jnp.array([[1.0, 2, 0, 9], [1, 0, 3, 9], [0, 0, 1, 9], [0, 0, 0, 9]])
    embeddings = Embeddings(logits[:, None], jnp.eye(4), jnp.asarray(0.5))
    loss = contrast(embeddings, batch, SMALL.objectives)
    assert float(loss.metrics["vtc/accuracy"]) == pytest.approx(2 / 3)  # the second clip is wrong
    other = embeddings._replace(video=embeddings.video.at[3].set(5.0))
    same = contrast(other, batch, SMALL.objectives)
    assert loss.value == same.value and loss.metrics == same.metrics
    assert loss.metrics["vtc/temperature"] == 0.5


def test_the_sigmoid_loss_starts_from_the_values_of_the_paper():
    """SigLIP multiplies by exp(t'), which is 10 at first, and adds -10."""
    config = dataclasses.replace(SMALL.objectives, vtc_loss="sigmoid")
    batch = random_batch(3)
    params = jax.jit(partial(init_params, small_model(), objectives=config))(batch)
    assert params["logit_bias"] == -10 and params["temperature"] == np.float32(0.1)

    def run(model: VideoLanguageModel):
        found = embed(model, extract(model, batch, KEYS, config), config)
        return found, contrast(found, batch, config)

    found, loss = apply(params, run)
    logits = 10 * np.einsum("ite,je->ij", found.video, found.text) / 2 - 10
    signs = 2 * np.eye(3) - 1
    np.testing.assert_allclose(loss.value, np.log1p(np.exp(-signs * logits)).sum() / 3, rtol=1e-5)
    assert loss.metrics["vtc/bias"] == -10


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_recomputation_gives_the_same_gradients(remat, params, gradients):
    step = partial(
        loss_gradients, model=small_model(remat=remat), objectives=SMALL.objectives, shards=1
    )
    batch = random_batch()
    actual, expected = jax.jit(step)(params, batch, KEY), gradients(batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected)


def test_bfloat16_keeps_parameters_and_losses_in_float32(params, gradients):
    model, batch = small_model(dtype="bfloat16"), random_batch()
    shapes = jax.eval_shape(partial(init_params, model), batch)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}

    def run(params):
        def extract_and_compute(model: VideoLanguageModel):
            tokens = model.encode_text(batch.text_ids, batch.text_mask).tokens
            return tokens, objectives.compute_losses(model, batch, mask_key, SMALL.objectives)

        return model.apply({"params": params}, method=extract_and_compute)

    mask_key = jax.random.split(KEY, 3)[0]  # as `loss_gradients` splits it
    tokens, loss = jax.jit(run)(params)
    _, expected = gradients(batch)
    assert tokens.dtype == jnp.bfloat16
    for name in ("loss/vtc", "loss/vtm", "loss/mlm", "loss/mvm", "loss/total"):
        assert loss.metrics[name].dtype == jnp.float32
        np.testing.assert_allclose(loss.metrics[name], expected[name], rtol=0.05, err_msg=name)


def test_images_train_with_the_parameters_of_clips(params):
    step = partial(loss_gradients, model=small_model(), objectives=SMALL.objectives, shards=1)
    grads, metrics = jax.eval_shape(step, params, random_batch(frames=1), KEY)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert {f"loss/{name}" for name in NAMES} < set(metrics)


def test_a_mask_is_drawn_unless_nothing_is_removed():
    for mask_config in (MaskConfig("none"), MaskConfig("tube", ratio=0.0)):
        video = dataclasses.replace(SMALL.model.video, mask=mask_config)
        model = VideoLanguageModel(dataclasses.replace(SMALL.model, video=video), image_size=16)
        assert sample_mask(model, random_batch(), KEY) is None
    mask = sample_mask(small_model(), random_batch(), KEY)
    assert mask.removed_mask.shape == (6, 2, 16)
    assert (mask.removed_mask.sum(axis=-1) == 11).all()
