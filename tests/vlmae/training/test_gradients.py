"""Gradients of a batch in parts: means over the parts, and VTC over the whole batch exactly."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize, small_model

from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ObjectivesConfig
from vlmae.config.model import MaskConfig
from vlmae.config.tree import override
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.ops import losses, masking
from vlmae.training.features import Loss
from vlmae.training.gradients import accumulated, loss_gradients, make_gradients, weights_of
from vlmae.training.objectives import FUNCTIONS, compute_losses
from vlmae.training.pairs import Embeddings, contrast, embed

PARTS, KEY = 4, jax.random.key(5)
ONLY_VTC = ObjectivesConfig(vtc=1.5, vtm=0.0, mlm=0.0, mvm=0.0)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)


def odd_batch() -> Batch:
    """Sixteen rows; one part has two padding rows, and a clip has three captions in three parts."""
    batch = random_batch(16)
    ids = batch.media_ids.at[jnp.array([5, 14])].set(0)
    return batch._replace(media_ids=ids, valid=jnp.ones(16, bool).at[jnp.array([3, 7])].set(False))


def params_of(model: VideoLanguageModel, objectives: ObjectivesConfig):
    """Random parameters of what the objectives use."""
    return randomize(jax.jit(partial(init_params, model, objectives=objectives))(random_batch(2)))


# --- all objectives but VTC


def toy_gradients(params: dict, batch: Batch, key, shares=None) -> tuple[dict, dict]:
    """A gradient that depends on every pixel, on the order of rows and on the key."""
    order = jnp.arange(1.0, 1 + len(batch.valid))
    pixels = (batch.video.mean(axis=(1, 2, 3, 4)) * order).mean()
    share = 1.0 if shares is None else shares["loss"]
    grads = {"w": share * (params["w"] * pixels + jax.random.normal(key))}
    return grads, {"loss": share * pixels}


def toy_weights(params: dict, batch: Batch, key) -> dict:
    return {"loss": batch.valid.sum()}


def test_accumulated_gradients_are_the_mean_over_the_rows_of_all_parts():
    """Of parts with 2, 1 and no valid rows."""
    valid = jnp.array([True, True, False, True, False, False])
    batch = random_batch(6)._replace(valid=valid)
    params = {"w": jnp.array([1.0, 2.0])}
    results = []
    for part, part_key in enumerate(jax.random.split(KEY, 3)):
        rows = jax.tree.map(lambda x, part=part: x[part::3], batch)
        results.append(toy_gradients(params, rows, part_key))
    expected = jax.tree.map(lambda a, b, _: (2 * a + b) / 3, *results)
    actual = jax.jit(accumulated(toy_gradients, toy_weights, 3))(params, batch, KEY)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), actual, expected)


def test_one_part_is_the_plain_gradient():
    assert accumulated(toy_gradients, toy_weights, 1) is toy_gradients


# --- VTC


def test_vtc_in_parts_is_vtc_at_once():
    """Without anything random, the parts leave no trace: neither in the loss nor in a gradient."""
    video = dataclasses.replace(SMALL.model.video, mask=MaskConfig("none"))
    model = VideoLanguageModel(dataclasses.replace(SMALL.model, video=video), image_size=16)
    params, seen = params_of(model, ONLY_VTC), {}
    for scope in ("global", "local"):
        objectives = dataclasses.replace(ONLY_VTC, vtc_scope=scope)
        (whole, expected), (grads, metrics) = (
            jax.jit(make_gradients(model, objectives, 2, parts))(params, odd_batch(), KEY)
            for parts in (1, PARTS)
        )
        jax.tree.map(close, grads, whole)
        for name in ("loss/vtc", "loss/total", "vtc/accuracy", "vtc/temperature"):
            close(metrics[name], expected[name])
        assert whole["temperature"] != 0
        seen[scope] = float(metrics["loss/vtc"])
    assert seen["global"] != pytest.approx(seen["local"], rel=1e-2), "two different losses"


@pytest.mark.parametrize(
    ("mask_text_for", "vtc_loss"), [("mlm", "softmax"), ("all", "softmax"), ("mlm", "sigmoid")]
)
def test_all_objectives_in_parts_are_their_sum_differentiated_at_once(mask_text_for, vtc_loss):
    """With masks of both and dropout in the text: the oracle keeps the activations of all parts."""
    changes = {"mvm": 0.0, "mask_text_for": mask_text_for, "vtc_loss": vtc_loss}
    parts, objectives = 2, dataclasses.replace(SMALL.objectives, **changes)
    model, batch = build_model(SMALL, deterministic=False), odd_batch()
    params = params_of(model, objectives) | {"temperature": jnp.asarray(0.1)}
    keys = jax.random.split(KEY, parts)

    def reveal(model, features, context) -> Loss:
        return Loss(jnp.zeros(()), embed(model, features, objectives)._asdict())

    def at_once(params) -> tuple:
        found, videos, texts = [], [], []
        for part in range(parts):
            rows = jax.tree.map(lambda x, part=part: x[part::parts], batch)
            key, dropout, noise = jax.random.split(keys[part], 3)
            loss = model.apply(
                {"params": params},
                *(rows, key, objectives, 1, {**FUNCTIONS, "vtc": reveal}),
                method=compute_losses,
                rngs={"dropout": dropout, "noise": noise},
            )
            found.append((loss.metrics, loss.weights))
            videos.append(loss.metrics["video"])
            texts.append(loss.metrics["text"])
        # Row r is number r // parts of part r % parts.
        rows = [(r // parts, r % parts) for r in range(len(batch.valid))]
        video = jnp.stack([videos[part][row] for row, part in rows])
        text = jnp.stack([texts[part][row] for row, part in rows])
        total = 0.0
        for name, weight in objectives.weights.items():
            counts = [counts[f"loss/{name}"] for _, counts in found]
            sums = [m[f"loss/{name}"] * n for (m, _), n in zip(found, counts, strict=True)]
            total += weight * sum(sums) / sum(counts) * (name != "vtc")
        embeddings = Embeddings(video, text, loss.metrics["temperature"], loss.metrics["bias"])
        whole = contrast(embeddings, batch, objectives)
        return total + objectives.vtc * whole.value, (whole.value, whole.metrics["vtc/accuracy"])

    (total, expected), expected_grads = jax.jit(jax.value_and_grad(at_once, has_aux=True))(params)
    gradients = make_gradients(model, objectives, shards=1, parts=parts)
    grads, metrics = jax.jit(gradients)(params, batch, KEY)
    close(metrics["loss/total"], total)
    close((metrics["loss/vtc"], metrics["vtc/accuracy"]), expected)
    # A sum over the 16 pairs of a row has larger gradients, and so have their roundings.
    tolerance = 32e-6 if vtc_loss == "sigmoid" else 2e-6
    jax.tree.map(partial(close, atol=tolerance), grads, expected_grads)
    assert ("logit_bias" in grads) == (vtc_loss == "sigmoid")


def by_row(monkeypatch, vocab_size: int) -> None:
    """Make all that is random a function of the row's media id, so that parts draw alike."""

    def keys(batch: Batch):
        return jax.vmap(partial(jax.random.fold_in, jax.random.key(3)))(batch.media_ids)

    def sample_mask(model, batch: Batch, _) -> masking.PatchMask:
        noise = jax.vmap(lambda key: jax.random.uniform(key, (2, model.grid[0] * model.grid[1])))
        return masking.mask_from_noise(noise(keys(batch)), model.config.video.mask.ratio)

    def mask_tokens(model, batch: Batch, _, ratio: float) -> losses.MaskedTokens:
        def one(key, ids, maskable):
            options = {"ratio": ratio, "mask_id": 3, "vocab_size": vocab_size}
            return losses.mask_tokens(key, ids[None], maskable[None], **options)

        maskable = batch.text_mask & batch.valid[:, None]
        masked = jax.vmap(one)(keys(batch), batch.text_ids, maskable)
        return jax.tree.map(lambda x: x[:, 0], masked)

    def hard_negatives(model, features, context) -> tuple:
        valid, ids = context.batch.valid, context.batch.media_ids
        own = jnp.arange(len(valid))
        some = losses.Negatives(own, valid & (ids % 2 == 0))
        return some, losses.Negatives(own, valid & (ids % 3 == 0))

    monkeypatch.setattr("vlmae.training.features.sample_mask", sample_mask)
    monkeypatch.setattr("vlmae.training.features.mask_tokens", mask_tokens)
    monkeypatch.setattr("vlmae.training.pairs.hard_negatives", hard_negatives)


OFF = {f"objectives.{name}": 0.0 for name in ("vtc", "vtm", "mlm", "mvm")}
TASKS = {
    "pre-training": {
        "objectives.mcm": 0.6,
        "objectives.mcm_kind": "score",
        "objectives.mcm_len": 12,
        "objectives.vtm": 0.7,
    },
    "answers": {
        **OFF,
        "data.task": "questions",
        "objectives.answer": 1.0,
        "model.num_classes": 4,
    },
    "labels": {**OFF, "data.task": "labels", "objectives.label": 1.0, "model.num_classes": 4},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_objective_in_parts_is_that_of_one_pass(task, monkeypatch):
    """Parts of three, two, one and no valid rows, other rows without a question or a target."""
    config = override(SMALL, {**TASKS[task], "model.text.dropout": 0.0})
    by_row(monkeypatch, config.model.text.vocab_size)
    model, others = build_model(config), random_batch(24, seed=2)
    batch = random_batch(8)._replace(
        valid=jnp.array([1, 0, 1, 0, 1, 0, 0, 0], bool),
        targets=jnp.eye(8, 4, dtype=bool)[jnp.array([0, 1, 5, 2, 3, 0, 0, 1])],
        other_ids=others.text_ids.reshape(8, 3, -1),
        other_mask=others.text_mask.reshape(8, 3, -1).at[4, 1].set(False),
    )
    params = randomize(init_params(model, batch, config.objectives))
    (whole, expected), *split = (
        jax.jit(make_gradients(model, config.objectives, 1, parts))(params, batch, KEY)
        for parts in (1, 2, 4)
    )
    for grads, metrics in split:
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            close(metrics[name], value, err_msg=name)
        jax.tree.map(partial(close, atol=1e-4), grads, whole)  # of gradients up to 30, in float32
    trained = [name for name in config.objectives.weights if expected[f"loss/{name}"] > 0]
    assert trained == list(config.objectives.weights), "every loss has something to say"


def test_without_vtc_there_is_one_pass():
    """The gradients are those of the parts alone, so nothing is computed twice."""
    objectives = ObjectivesConfig(vtc=0.0, vtm=0.0, mlm=1.0, mvm=0.0)
    model, batch = small_model(), random_batch(8)
    params = params_of(model, objectives)
    plain, weights = (
        partial(function, model=model, objectives=objectives, shards=1)
        for function in (loss_gradients, weights_of)
    )
    expected = jax.make_jaxpr(accumulated(plain, weights, 2))(params, batch, KEY)
    actual = jax.make_jaxpr(make_gradients(model, objectives, 1, 2))(params, batch, KEY)
    assert len(str(actual)) == len(str(expected))


def test_parts_need_less_memory():
    """Four parts of sixteen rows: less than half the temporary memory of all rows at once."""
    model, batch = small_model(), random_batch(64)
    params = params_of(model, ONLY_VTC)
    programs = [
        jax.jit(make_gradients(model, ONLY_VTC, 1, parts)).lower(params, batch, KEY)
        for parts in (1, 4)
    ]
    whole, parts = (p.compile().memory_analysis().temp_size_in_bytes for p in programs)
    assert parts < whole / 2
