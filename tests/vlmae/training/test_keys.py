"""Randomness: one seed, and a key of its own for every step, part, mask, objective and stream."""

import dataclasses
import itertools
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exported_models import WORDS
from helpers import (
    SMALL,
    drawn_keys,
    init_params,
    key_numbers,
    random_batch,
    randomize,
    small_model,
)

from data_pipelines.text.tokenize import Tokenizer
from vlmae.cli import run_experiment
from vlmae.config.tree import override
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops import losses
from vlmae.parallel.sharding import make_mesh
from vlmae.runs.checkpoint import Checkpoints
from vlmae.training import features, objectives, pairs, train
from vlmae.training.features import Context, Features, Loss, extract, keys_of
from vlmae.training.gradients import split_key
from vlmae.training.pairs import embed, fuse_pairs, vtc_logits
from vlmae.training.step import TrainState, make_init, train_step
from vlmae.training.train import start_state

KEY = jax.random.key(5)


def test_a_step_splits_its_key_into_different_ones():
    objective_key, streams = split_key(KEY)
    keys = [*keys_of(objective_key).values(), *streams.values(), objective_key, KEY]
    assert len({key_numbers(key) for key in keys}) == len(keys)


def test_every_step_of_every_seed_has_a_key_of_its_own():
    params, tx = {"w": jnp.ones(2)}, optax.sgd(0.1)

    def gradients(params, batch, key):
        return params, {"key": jax.random.key_data(key)}

    seen = set()
    for seed, step in itertools.product(range(3), range(4)):
        state = TrainState(jnp.int32(seed), jnp.int32(step), params, tx.init(params))
        after, metrics = train_step(state, random_batch(2), gradients=gradients, tx=tx)
        assert (after.seed, after.step) == (seed, step + 1)
        seen.add(tuple(metrics["key"].tolist()))
    assert len(seen) == 12


def test_masks_and_objectives_draw_by_keys_of_their_own(monkeypatch):
    """Keys that `compute_losses` gives to the visual mask, masked words, pairs and objectives."""
    seen = {}

    def remember(name, module, function):
        real = getattr(module, function)

        def called(*args, **kwargs):
            keys = [x.key if isinstance(x, Context) else x for x in args]
            seen[name] = next(x for x in keys if isinstance(x, jax.Array) and x.dtype == KEY.dtype)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, called)

    remember("mask", features, "draw_mask")
    remember("mlm", losses, "mask_tokens")
    remember("pairs", objectives, "fuse_pairs")

    def record(name):
        def objective(model, features, context: Context) -> Loss:
            assert name != "mlm" or seen[name] is context.key  # of the words that are masked
            seen[name] = context.key
            return Loss(jnp.zeros(()), {})

        return objective

    config = dataclasses.replace(SMALL.objectives, mcm=1.0)
    functions = {name: record(name) for name in objectives.FUNCTIONS}
    model, batch = small_model(), random_batch(4)

    def run(model: VideoLanguageModel):
        objectives.compute_losses(model, batch, KEY, config, functions=functions)
        return {name: jax.random.key_data(key) for name, key in seen.items()}

    found = jax.jit(lambda: model.init_with_output(KEY, method=run)[0])()
    expected = {name: key_numbers(key) for name, key in keys_of(KEY).items()}
    expected["pairs"] = expected["vtm"]
    assert set(found) == {"mask", "mlm", "pairs", "vtc", "vtm", "mvm", "mcm"}
    for name, key in found.items():
        assert tuple(np.asarray(key).tolist()) == expected[name], name


@pytest.mark.parametrize("hardness", [1.0, 0.25])
def test_negatives_of_both_directions_are_mined_apart(monkeypatch, hardness):
    """Texts by the rows of the similarities, clips by their columns, each by a key of its own."""
    batch, drawn = random_batch(5), []
    real = losses.mine_negatives

    def mine(key, logits, *rest):
        drawn.append((key, logits))
        return real(key, logits, *rest)

    monkeypatch.setattr(losses, "mine_negatives", mine)
    model = small_model()

    def run(model: VideoLanguageModel):
        drawn.clear()
        found = extract(model, batch, keys_of(KEY), SMALL.objectives)
        config = dataclasses.replace(SMALL.objectives, vtm_hardness=hardness)
        pairs.hard_negatives(model, found, Context(batch, KEY, config))
        keys = [jax.random.key_data(key) for key, _ in drawn]
        logits = vtc_logits(embed(model, found, config))
        return keys, [logits for _, logits in drawn], logits

    params = randomize(jax.jit(partial(init_params, model))(batch))
    keys, (texts, clips), logits = jax.jit(
        lambda params: model.apply({"params": params}, method=run)
    )(params)
    assert len({*map(tuple, np.asarray(keys).tolist()), key_numbers(KEY)}) == 3
    np.testing.assert_allclose(texts, hardness * logits, rtol=1e-5)
    np.testing.assert_allclose(clips, hardness * np.asarray(logits).T, rtol=1e-5)
    assert np.abs(logits - logits.T).max() > 0.1


def test_a_hard_text_and_a_hard_clip_stand_in_their_own_pairs(monkeypatch):
    """Clip i with a text that is hard for it; text i with a clip that is; masks in that order."""
    rows, text_of, clip_of = jnp.arange(5), jnp.array([1, 2, 3, 4, 0]), jnp.array([3, 4, 0, 1, 2])
    exists = jnp.array([1, 1, 0, 0, 1], bool), jnp.array([1, 0, 1, 0, 1], bool)
    drawn = losses.Negatives(text_of, exists[0]), losses.Negatives(clip_of, exists[1])
    monkeypatch.setattr(pairs, "hard_negatives", lambda *_: drawn)
    numbers = jnp.tile(rows[:, None, None] * 1.0, (1, 8, 16))  # each text says which one it is
    batch, given = random_batch(5), []
    text = TextFeatures(numbers, batch.text_mask)
    empty = jnp.zeros((5, 2, 16))
    video = VideoFeatures(empty[:, :, None], empty, (jnp.zeros((5, 2, 1), int),), empty > 0)
    found = Features(video, text, None, text._replace(tokens=-1 - numbers))

    def record(call, args, kwargs, context):
        if context.method_name != "fuse":
            return call(*args, **kwargs)
        given.append(args[1:])
        return jnp.zeros((20, 8, 16))

    def run(model: VideoLanguageModel):
        with nn.intercept_methods(record):
            return fuse_pairs(model, found, Context(batch, KEY, SMALL.objectives)).fused

    fused = small_model().apply({}, method=run)
    (words, clips), expected = given[0], []
    for i in range(5):
        expected += [(i, i), (i, int(clip_of[i])), (int(text_of[i]), i), (-1 - i, i)]
    said = words.tokens[:, 0, 0].astype(int).tolist()
    assert list(zip(said, clips.ravel().tolist(), strict=True)) == expected
    exists_of_pair = jnp.stack([batch.valid, exists[1], exists[0]], axis=1)
    np.testing.assert_array_equal(fused.mask, exists_of_pair)


def test_the_options_and_their_order_are_drawn_apart(monkeypatch):
    keys = drawn_keys(monkeypatch)
    objectives.draw_options(random_batch(4), KEY, SMALL.objectives)
    assert len({*keys, key_numbers(KEY)}) == 3


def test_seeds_start_differently_and_stay_with_their_run():
    init = jax.jit(make_init(override(SMALL, {"objectives.vtm": 0.0, "objectives.mlm": 0.0})))
    one, same, other = init(1), init(1), init(2)
    assert (one.seed, other.seed, one.step) == (1, 2, 0)
    jax.tree.map(np.testing.assert_array_equal, one.params, same.params)
    pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
    random = [(a != b).mean() for a, b in pairs if a.ndim == 2 and a.std()]
    assert len(random) > 10 and min(random) > 0.99


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_of_the_config_makes_the_state_and_the_batches(seed, monkeypatch, tmp_path):
    config, tx, given = override(SMALL, {"seed": seed}), optax.identity(), []

    def init(seed):
        params = {"w": jax.random.normal(jax.random.key(seed), (2, 2))}
        return TrainState(jnp.asarray(seed, "int32"), jnp.int32(0), params, tx.init(params))

    monkeypatch.setattr(train, "abstract_state", lambda config: jax.eval_shape(init, 0))
    monkeypatch.setattr(train, "sharded_init", lambda config, mesh: init)
    with Checkpoints(tmp_path) as checkpoints:
        state, _ = start_state(config, make_mesh(config.mesh, jax.devices()[:1]), checkpoints)
    np.testing.assert_array_equal(state.params["w"], init(seed).params["w"])
    assert state.seed == seed

    tokenizer = Tokenizer.from_vocabulary(WORDS)
    stubs = {
        "resolve": lambda config: (config, tokenizer, None),
        "train": lambda config, workdir, make_batches, *_: make_batches(config.data, 0, 0, 1) or {},
        "train_batches": lambda *_, seed, **__: given.append(seed),
        "write_result": lambda *_: {"cost": {"total_flops": math.nan}},
        "describe_run": lambda _: [],
    }
    nothing = ("eval_data", "data_state", "note_data", "print_tables")
    for name, stub in (stubs | dict.fromkeys(nothing, lambda *_: None)).items():
        monkeypatch.setattr(run_experiment, name, stub)
    run_experiment.run_experiment(config, tmp_path)
    assert given == [seed]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"x": jnp.zeros(2)})
        checkpoints.manager.wait_until_finished()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]
