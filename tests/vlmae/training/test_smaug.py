"""SMAUG's options in whole models: decoded places, masked text, scopes, keep-rate schedule."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize, small_model
from oracles import random

from data_pipelines.schema.config import DataConfig
from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ExperimentConfig, ObjectivesConfig
from vlmae.config.model import PixelDecoderConfig, SparsifyConfig
from vlmae.config.phases import segments
from vlmae.config.tree import override
from vlmae.evaluation.evaluate import evaluate_workdir
from vlmae.models.attention import take_rows
from vlmae.models.fusion import CrossAttentionFusion
from vlmae.models.pixel_decoder import decoded_patch_ids, num_decoded, scatter_tokens
from vlmae.models.text_encoder import TextEncoder
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops.token_pruning import NO_PATCH
from vlmae.runs.metric_registry import PRUNED, metric_of
from vlmae.runs.metric_writer import read_metrics
from vlmae.training.features import Context, Features, extract, keys_of, sample_mask
from vlmae.training.objectives import mvm
from vlmae.training.pairs import fuse_pairs, rows_in_shards, vtc, vtm
from vlmae.training.schedule import config_before
from vlmae.training.train import train

KEY = jax.random.key(5)
KEYS = keys_of(KEY)


@pytest.fixture(scope="module")
def params():
    return randomize(jax.jit(partial(init_params, small_model()))(random_batch()))


def apply(params, run, model: VideoLanguageModel | None = None):
    """run(bound model), compiled."""
    model = model or small_model()
    rngs = {"noise": KEY, "dropout": KEY}
    return jax.jit(lambda params: model.apply({"params": params}, method=run, rngs=rngs))(params)


# --- where the decoder paints


def test_fused_tokens_are_not_scattered():
    tokens, mask_token = random(2, 2, 4, 5), random(5, seed=1)
    patch_ids = np.array([[[0, 3, 5, -1], [1, 4, -1, -1]], [[5, -1, 0, 2], [-1, -1, -1, -1]]])
    expected = np.broadcast_to(mask_token, (2, 2, 6, 5)).copy()
    for b, t, m in np.argwhere(patch_ids != NO_PATCH):
        expected[b, t, patch_ids[b, t, m]] = tokens[b, t, m]
    scatter = jax.jit(scatter_tokens, static_argnums=3)
    np.testing.assert_array_equal(scatter(tokens, patch_ids, mask_token, 6), expected)


def test_the_number_of_decoded_places():
    assert num_decoded(196, 27, 68, 0.5) == 27 + 64 == 91
    assert num_decoded(196, 68, 68, 0.0) == 196
    assert num_decoded(16, 16, 16, 0.5) == 16, "never more than there are"


def test_decoded_places_against_a_loop():
    """Six of 16 patches are visible, four of them survive; with them go removed ones by noise."""
    rng = np.random.default_rng(0)
    visible = np.argsort(rng.random((3, 2, 16)), axis=-1)[..., :6]
    removed = np.ones((3, 2, 16), bool)
    np.put_along_axis(removed, visible, False, axis=-1)
    fused = np.full((3, 2, 1), NO_PATCH)
    patch_ids = np.concatenate([np.sort(visible[..., :4], axis=-1), fused], axis=-1)
    noise = rng.random((3, 2, 16), np.float32)
    chosen = jax.jit(decoded_patch_ids, static_argnums=3)(noise, patch_ids, removed, 10)
    for b, t in np.ndindex(3, 2):
        occupied = patch_ids[b, t, :4].tolist()
        order = sorted(np.flatnonzero(removed[b, t]), key=lambda n, b=b, t=t: noise[b, t, n])
        assert chosen[b, t].tolist() == sorted([*occupied, *order[:6]])


CHEAP = PixelDecoderConfig(width=16, depth=1, num_heads=2, target_ratio=0.5)
THIN = dataclasses.replace(
    SMALL.model.video, sparsify=SparsifyConfig(keep_rate=0.5, eval_keep_rate=0.5, stages=(0,))
)


def test_only_the_removed_patches_that_are_decoded_count(params):
    """Of 16 patches 5 are visible and 3 survive; 5 of the removed are decoded and 1 for [fused]."""
    batch = random_batch(4)
    model = small_model(video=THIN, pixel_decoder=CHEAP).clone(deterministic=False)

    def features_of(model: VideoLanguageModel) -> Features:
        video = model.encode_video(batch.video, sample_mask(model, batch, KEY))
        return Features(video, None)

    def loss(model: VideoLanguageModel):
        return mvm(model, features_of(model), Context(batch, KEY, SMALL.objectives)).value

    def parts(model: VideoLanguageModel):
        video = features_of(model).video
        return video, model.decode_pixels(video), model.patches(batch.video)

    video, painted, target = jax.device_get(apply(params, parts, model))
    assert painted.pixels.shape == (4, 2, 9, 48) and painted.patch_ids.shape == (4, 2, 9)
    errors = []
    for b, t in np.ndindex(4, 2):
        counted = [s for s, n in enumerate(painted.patch_ids[b, t]) if video.removed_mask[b, t, n]]
        assert len(counted) == 6
        for s in counted:
            patch = target[b, t, painted.patch_ids[b, t, s]]
            patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            errors.append(((painted.pixels[b, t, s] - patch) ** 2).mean())
    np.testing.assert_allclose(apply(params, loss, model), np.mean(errors), rtol=1e-5)


@pytest.mark.parametrize(("ratio", "training"), [(0.5, False), (0.0, True)])
def test_evaluation_and_ratio_zero_decode_every_patch(params, ratio, training):
    decoder = dataclasses.replace(CHEAP, target_ratio=ratio)
    model = small_model(video=THIN, pixel_decoder=decoder).clone(deterministic=not training)
    batch = random_batch(2)

    def run(model: VideoLanguageModel):
        mask = sample_mask(model, batch, KEY)
        video = model.encode_video(batch.video, mask)

        def size(tokens):
            return (model.decode_pixels(video._replace(tokens=tokens)).pixels ** 2).sum()

        return video.patch_ids, model.decode_pixels(video), jax.grad(size)(video.tokens)

    patch_ids, painted, gradient = apply(params, run, model)
    assert painted.pixels.shape == (2, 2, 16, 48)
    np.testing.assert_array_equal(painted.patch_ids, np.broadcast_to(np.arange(16), (2, 2, 16)))
    np.testing.assert_array_equal((gradient != 0).any(axis=-1), patch_ids != NO_PATCH)


# --- masked text for every objective


@pytest.mark.parametrize("mask_text_for", ["mlm", "all"])
def test_whether_all_objectives_read_the_masked_text(params, mask_text_for):
    config = dataclasses.replace(SMALL.objectives, mask_text_for=mask_text_for)
    batch, passes = random_batch(), []

    def count(call, args, kwargs, context):
        if isinstance(context.module, TextEncoder) and context.method_name == "__call__":
            passes.append(len(args[0]))
        return call(*args, **kwargs)

    def run(model: VideoLanguageModel):
        with nn.intercept_methods(count):
            features = extract(model, batch, KEYS, config)
        assert (features.text is features.masked_text) == (mask_text_for == "all")
        masked = model.encode_text(features.masked_tokens.ids, batch.text_mask)
        return features, masked, model.encode_text(batch.text_ids, batch.text_mask)

    features, masked, plain = apply(params, run)
    assert passes == [6 if mask_text_for == "all" else 2 * 6]  # texts, all at once
    expected = masked if mask_text_for == "all" else plain
    np.testing.assert_allclose(features.text.tokens, expected.tokens, atol=1e-6)
    np.testing.assert_allclose(features.masked_text.tokens, masked.tokens, atol=1e-6)
    assert np.abs(masked.cls - plain.cls).max() > 1e-3


@pytest.mark.parametrize(("mask_text_for", "texts"), [("mlm", 4 * 6), ("all", 3 * 6)])
def test_matching_and_word_modeling_fuse_in_one_pass(params, mask_text_for, texts):
    """The hidden words meet their own clip, as if they were fused by themselves."""
    config = dataclasses.replace(SMALL.objectives, mask_text_for=mask_text_for)
    batch, passes = random_batch(), []

    def count(call, args, kwargs, context):
        if isinstance(context.module, CrossAttentionFusion) and context.method_name == "__call__":
            passes.append(len(args[0].tokens))
        return call(*args, **kwargs)

    def run(model: VideoLanguageModel):
        features = extract(model, batch, KEYS, config)
        with nn.intercept_methods(count):
            fused = fuse_pairs(model, features, Context(batch, KEY, config)).fused
        pairs = [(features.video, text) for text in (features.text, features.masked_text)]
        return fused, [model.fuse(*pair) for pair in pairs]

    fused, (right, words) = apply(params, run)
    assert passes == [texts]
    np.testing.assert_allclose(fused.tokens[:, 0], right, atol=1e-6)
    np.testing.assert_allclose(fused.masked_text, words, atol=1e-6)


# --- scopes


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_rows_in_shards_against_plain_indexing(shards):
    x, rng = random(6, 4), np.random.default_rng(0)
    first = np.arange(6) // (6 // shards) * (6 // shards)
    rows = first[:, None] + rng.integers(0, 6 // shards, (6, 2))
    within = rows_in_shards(jnp.asarray(rows), shards)
    assert within.shape == (shards, 12 // shards)
    np.testing.assert_array_equal(jax.jit(take_rows)(x, within), x[rows.ravel()])
    np.testing.assert_array_equal(jax.jit(take_rows)(x[:, 0], within), x[rows.ravel(), 0])


def test_local_scopes_draw_from_the_own_shard(params):
    """In two shards of two rows, each row is the only negative of its neighbor."""
    batch = random_batch(4)
    local = ObjectivesConfig(vtc_scope="local", vtm_scope="local")
    everywhere = ObjectivesConfig(vtc_scope="global", vtm_scope="global")

    def run(model: VideoLanguageModel):
        features = extract(model, batch, KEYS, local)

        def both(config: ObjectivesConfig, shards: int):
            context = Context(batch, KEY, config, shards)
            fused = fuse_pairs(model, features, context)
            return [objective(model, fused, context).value for objective in (vtc, vtm)]

        halves = []
        for part in (slice(0, 2), slice(2, 4)):
            half, rows = jax.tree.map(lambda x, part=part: x[part], (features, batch))
            halves.append(vtc(model, half, Context(rows, KEY, local)).value)
        texts, videos = jnp.array([0, 1, 2, 3, 0, 1, 2, 3]), jnp.array([0, 1, 2, 3, 1, 0, 3, 2])
        fused = model.fuse(
            jax.tree.map(lambda x: x[videos], features.video),
            jax.tree.map(lambda x: x[texts], features.text),
        )
        log_p = jax.nn.log_softmax(model.match(fused))
        matching = -(log_p[:4, 1].sum() + 2 * log_p[4:, 0].sum()) / 12
        cases = [(local, 2), (local, 1), (everywhere, 2), (everywhere, 1)]
        return [both(*case) for case in cases], [sum(halves) / 2, matching]

    (cut, whole, ignored, one), expected = apply(params, run)
    np.testing.assert_allclose(cut, expected, rtol=1e-5)
    np.testing.assert_allclose(ignored, one, rtol=1e-6)
    np.testing.assert_allclose(whole, one, rtol=1e-6)
    assert abs(cut[0] - one[0]) > 1e-3 and abs(cut[1] - one[1]) > 1e-5


# --- the keep-rate schedule

SCHEDULE = {
    "model.video.depth": 2,
    "model.video.sparsify.stages": (0,),
    "model.video.sparsify.keep_rate": 0.5,
    "model.video.sparsify.warmup_rates": (1.0,),
    "model.video.sparsify.warmup_steps": 2,
}


def test_the_keep_rate_of_every_step():
    more = {
        "model.video.sparsify.warmup_rates": (1.0, 0.75),
        "model.video.sparsify.warmup_steps": 4,
    }
    config = override(SMALL, SCHEDULE | more)
    parts = segments(config)
    configs = [config_before(parts, step) for step in range(1, 7)]
    rates = [config.model.video.sparsify.keep_rate for config in configs]
    assert rates == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5]


def batches(data: DataConfig, start: int, part: int, parts: int) -> Iterator[Batch]:
    """The same clips and captions for ever."""
    while True:
        yield jax.device_get(random_batch(6))


def test_training_over_a_schedule_compiles_once_for_each_rate(tmp_path, capsys):
    objectives_off = {"objectives.vtm": 0.0, "objectives.mlm": 0.0, "objectives.mvm": 0.0}
    steps = {"train.steps": 4, "train.log_every_steps": 1, "train.save_every_steps": 4}
    config: ExperimentConfig = override(SMALL, SCHEDULE | objectives_off | steps)
    train(config, tmp_path / "run", batches, lambda params, mesh, on_progress: {})
    output = "".join(capsys.readouterr())
    assert output.count("compiled the step for video") == 2
    lines = read_metrics(tmp_path / "run")
    kept = {line["step"]: line["tokens/video_kept"] for line in lines if "loss/vtc" in line}
    assert kept == {1: 2 * 5, 2: 2 * 5, 3: 2 * (3 + 1), 4: 2 * (3 + 1)}


def test_a_run_with_merged_tokens_is_evaluated_at_both_keep_rates(run_tiny):
    """`pruned_` stands for the rate of training; the other evaluates with all tokens."""
    # Two blocks after the merging, which tell: a mean by sizes of merged tokens is that of all.
    flags = ("--model.video.sparsify.keep-rate", "0.5", "--model.video.sparsify.stages", "0")
    flags += ("--model.video.depth", "3")
    flags += ("--model.video.sparsify.rest", "merge", "--model.video.mask.ratio", "0")
    flags += ("--objectives.mvm", "0", "--train.steps", "2", "--evaluation.also-pruned")
    code, err, workdir = run_tiny(*flags)
    assert code == 0, err
    metrics = json.loads((workdir / "result.json").read_text())["metrics"]
    pruned = {name for name in metrics if name.startswith(PRUNED)}
    assert {name.removeprefix(PRUNED) for name in pruned} == set(metrics) - pruned
    assert any(metrics[name] != metrics[name.removeprefix(PRUNED)] for name in pruned)
    assert metric_of("pruned_retrieval/t2v_info_nce").better == "lower"
    assert (workdir / "pruned_retrieval.md").read_text()
    [again] = evaluate_workdir(workdir, keep_rate=0.5).values()
    for name, value in again.items():  # the rate is that of training now, so once is enough
        assert value == pytest.approx(metrics[f"{PRUNED}{name}"], rel=1e-5), name
