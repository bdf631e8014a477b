"""Gradients of a batch in parts: means over the parts, and VTC over the whole batch exactly."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize, small_model

from data_pipelines.records import Batch
from vlmae.config import ObjectivesConfig
from vlmae.gradients import accumulated, loss_gradients, make_gradients
from vlmae.model_config import MaskConfig
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.objectives import OBJECTIVES, Embeddings, Loss, compute_losses, contrast, embed

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


def toy_gradients(params: dict, batch: Batch, key) -> tuple[dict, dict]:
    """A gradient that depends on every pixel, on the order of rows and on the key."""
    order = jnp.arange(1.0, 1 + len(batch.valid))
    pixels = (batch.video.mean(axis=(1, 2, 3, 4)) * order).mean()
    return {"w": params["w"] * pixels + jax.random.normal(key)}, {"loss": pixels}


def test_accumulated_gradients_are_the_mean_over_the_parts():
    batch = random_batch(6)
    params = {"w": jnp.array([1.0, 2.0])}
    results = []
    for part, part_key in enumerate(jax.random.split(KEY, 3)):
        rows = jax.tree.map(lambda x, part=part: x[part::3], batch)
        results.append(toy_gradients(params, rows, part_key))
    expected = jax.tree.map(lambda *parts: sum(parts) / 3, *results)
    actual = jax.jit(accumulated(toy_gradients, 3))(params, batch, KEY)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), actual, expected)


def test_one_part_is_the_plain_gradient():
    assert accumulated(toy_gradients, 1) is toy_gradients


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


@pytest.mark.parametrize("mask_text_for", ["mlm", "all"])
def test_all_objectives_in_parts_are_their_sum_differentiated_at_once(mask_text_for):
    """With masks of both and dropout in the text: the oracle keeps the activations of all parts."""
    changes = {"mvm": 0.0, "mask_text_for": mask_text_for}
    parts, objectives = 2, dataclasses.replace(SMALL.objectives, **changes)
    model, batch = build_model(SMALL, deterministic=False), odd_batch()
    params = params_of(model, objectives)
    keys = jax.random.split(KEY, parts)

    def reveal(model, features, batch, key, config, shards=1) -> Loss:
        return Loss(jnp.zeros(()), embed(model, features)._asdict())

    def at_once(params) -> tuple:
        total, videos, texts = 0.0, [], []
        for part in range(parts):
            rows = jax.tree.map(lambda x, part=part: x[part::parts], batch)
            key, dropout, noise = jax.random.split(keys[part], 3)
            loss = model.apply(
                {"params": params},
                *(rows, key, objectives, 1, {**OBJECTIVES, "vtc": reveal}),
                method=compute_losses,
                rngs={"dropout": dropout, "noise": noise},
            )
            total += loss.value / parts
            videos.append(loss.metrics["video"])
            texts.append(loss.metrics["text"])
        # Row r is number r // parts of part r % parts.
        rows = [(r // parts, r % parts) for r in range(len(batch.valid))]
        video = jnp.stack([videos[part][row] for row, part in rows])
        text = jnp.stack([texts[part][row] for row, part in rows])
        whole = contrast(Embeddings(video, text, loss.metrics["temperature"]), batch, objectives)
        return total + objectives.vtc * whole.value, (whole.value, whole.metrics["vtc/accuracy"])

    (total, expected), expected_grads = jax.jit(jax.value_and_grad(at_once, has_aux=True))(params)
    gradients = make_gradients(model, objectives, shards=1, parts=parts)
    grads, metrics = jax.jit(gradients)(params, batch, KEY)
    close(metrics["loss/total"], total)
    close((metrics["loss/vtc"], metrics["vtc/accuracy"]), expected)
    jax.tree.map(close, grads, expected_grads)


def test_without_vtc_there_is_one_pass():
    """The gradients are those of the parts alone, so nothing is computed twice."""
    objectives = ObjectivesConfig(vtc=0.0, vtm=0.0, mlm=1.0, mvm=0.0)
    model, batch = small_model(), random_batch(8)
    params = params_of(model, objectives)
    plain = partial(loss_gradients, model=model, objectives=objectives, shards=1)
    expected = jax.make_jaxpr(accumulated(plain, 2))(params, batch, KEY)
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
