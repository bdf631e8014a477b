"""Frozen blocks and their adapters (MuLTI, version 1); encoding in chunks of frames."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SMALL, init_params, random_batch, randomize
from jaxtyping import PyTree
from oracles import attend, dense, layer_norm

from vlmae.config.experiment import ExperimentConfig
from vlmae.config.model import AdapterConfig, VitLayout
from vlmae.config.tree import override
from vlmae.models.adapter import ADAPTERS, Adapter
from vlmae.models.video_language import build_model
from vlmae.parallel.sharding import path_name
from vlmae.training.features import sample_mask
from vlmae.training.gradients import loss_gradients
from vlmae.training.init_weights import merge_params
from vlmae.training.optim import freeze, is_frozen, make_optimizer, optim_values

KEY = jax.random.key(3)
BATCH = random_batch(4, frames=4)
DEEP = override(SMALL, {"model.video.depth": 3, "model.text.depth": 3})


def adapted(kind: str, frozen: int = 2, **changes) -> ExperimentConfig:
    fields = {"kind": kind, "frozen_blocks": frozen, "width": 8, "num_heads": 2}
    parts = {
        f"model.{part}.adapter.{name}": value
        for part in ("video", "text")
        for name, value in fields.items()
    }
    return override(DEEP, parts | changes)


def features(config: ExperimentConfig, params: PyTree) -> PyTree:
    """Encodes the batch by both encoders."""
    model = build_model(config)

    def run(model):
        video, text = model.encode_video(BATCH.video), model.encode_text(BATCH[1], BATCH[2])
        return video.tokens, video.frame_cls, text.tokens

    return jax.jit(lambda p: model.apply({"params": p}, method=run))(params)


def flat(tree: PyTree) -> dict[str, jax.Array]:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def gradients(config: ExperimentConfig, params: PyTree) -> dict[str, jax.Array]:
    """Computes the gradients of all objectives as a training step does."""
    options = {"model": build_model(config), "objectives": config.objectives, "shards": 1}
    run = jax.jit(lambda params: loss_gradients(params, BATCH, KEY, **options)[0])
    return flat(run(params))


# --- the adapter


def test_an_adapter_against_numpy():
    config = AdapterConfig(width=8, num_heads=2)
    rng = np.random.default_rng(0)
    x, lengths = rng.normal(size=(3, 5, 12)).astype(np.float32), np.array([5, 2, 3], np.int32)
    adapter = Adapter(config)
    params = randomize(jax.jit(adapter.init)(KEY, x)["params"])
    p, valid = jax.tree.map(np.float64, params), np.arange(5) < lengths[:, None]
    down = dense(layer_norm(x, p["norm"]), p["down"])
    expected = dense(attend(down, down, valid, p["attention"]), p["up"])
    actual = jax.jit(adapter.apply)({"params": params}, x, lengths)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


# Two blocks are frozen; the side branch has joined when the third prunes.
PRUNED_LATER = {
    "model.video.sparsify.stages": (2,),
    "model.video.sparsify.keep_rate": 0.5,
    "model.video.sparsify.eval_keep_rate": 0.5,
}


@pytest.mark.parametrize(
    ("kind", "changes"), [("side", {}), ("inline", {}), ("side", PRUNED_LATER)], ids=str
)
def test_adapters_are_the_identity_at_the_start(kind, changes):
    without = override(DEEP, changes)
    plain = randomize(init_params(build_model(without), BATCH))
    config = adapted(kind, **changes)
    params, report = merge_params(init_params(build_model(config), BATCH), plain)
    assert report.missing and all("/adapters/" in name for name in report.missing)
    assert not report.unused + report.mismatched
    expected = features(without, plain)
    for x, y in zip(features(config, params), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x, y: y if "adapters" in path_name(path) else x, params, randomize(params)
    )
    for x, y in zip(features(config, moved), expected, strict=True):
        assert not np.allclose(x, y, atol=1e-3)


# --- what is frozen


@pytest.mark.parametrize("kind", ["side", "inline", "none"])
def test_frozen_parameters_get_no_gradient_and_all_others_do(kind):
    config = adapted(kind)
    params = randomize(init_params(build_model(config), BATCH))
    grads = gradients(config, params)
    # Softmax is invariant to what a key's bias adds.
    moved = {name for name, g in grads.items() if np.abs(g).max() > 1e-7}
    frozen = {name for name in grads if is_frozen(name, config.model)}
    assert not moved & frozen
    assert all(name.endswith("key/bias") for name in grads.keys() - moved - frozen)
    assert any("adapters" in name for name in moved) == (kind != "none")
    parts = {"/".join(name.split("/")[:2]) for name in frozen}
    assert parts == {
        *("video_encoder/" + name for name in ("cls", "patch_embed", "block_0", "block_1")),
        *("text_encoder/" + name for name in ("embeddings", "block_0", "block_1")),
    }


LAYOUTS = {
    "mae": {},
    "clip": {"model.video.layout": VitLayout(input_norm=True), "model.video.positions": "learned"},
    "deit": {"model.video.layout": VitLayout(extra_tokens=1), "model.video.positions": "learned"},
    "beit": {
        "model.video.layout": VitLayout(relative_bias="layer", frame_cls="mean", layer_scale=0.1),
        "model.video.positions": "none",
    },
    "beit, shared": {
        "model.video.layout": VitLayout(relative_bias="shared", frame_cls="mean"),
        "model.video.positions": "none",
    },
    "videomae": {
        "model.video.layout": VitLayout(cls_token=False, frame_cls="mean", tubelet=2, joint=True),
        "model.video.positions": "sincos_clip",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["side", "inline", "none"])
def test_all_of_the_frozen_blocks_is_frozen_wherever_it_lies(kind, layout):
    """Those are the parameters of encoders as deep as the frozen part, but for their last norm."""
    config = adapted(kind, **LAYOUTS[layout])
    shallow = {f"model.{part}.depth": 2 for part in ("video", "text")}
    shallow |= {f"model.{part}.adapter.frozen_blocks": 0 for part in ("video", "text")}

    def names(config: ExperimentConfig) -> set[str]:
        return {*flat(jax.eval_shape(lambda: init_params(build_model(config), BATCH)))}

    first = names(override(config, shallow))
    expected = {name for name in first if re.match(r"(video|text)_encoder/(?!norm/)", name)}
    assert {name for name in names(config) if is_frozen(name, config.model)} == expected


def test_block_ten_is_not_block_one():
    config = override(DEEP, {"model.video.depth": 12, "model.video.adapter.frozen_blocks": 2})
    assert is_frozen("video_encoder/block_1/mlp/up/kernel", config.model)
    assert not is_frozen("video_encoder/block_10/mlp/up/kernel", config.model)
    assert not is_frozen("video_encoder/adapters/block_0/up/kernel", config.model)
    assert not is_frozen("text_encoder/block_0/mlp/up/kernel", config.model)


def test_the_optimizer_has_no_state_for_frozen_parameters_and_leaves_them():
    config = adapted("side", **{"optim.weight_decay": 0.5, "optim.clip_norm": 1.0})
    params = init_params(build_model(config), BATCH)
    tx = make_optimizer(config.optim, optim_values(config.optim, 10), config.model)
    state = jax.jit(tx.init)(params)
    names = flat(state)
    learned = [name for name in flat(params) if not is_frozen(name, config.model)]
    size = sum(flat(params)[name].size for name in learned)
    for moment in ("mu", "nu"):  # of matrices by name, of all else joined
        held = [name for name in names if moment in name.split("/")]
        assert sum(names[name].size for name in held) == size
        named = [name.split(f"/{moment}/")[1] for name in held if f"/{moment}/" in name]
        assert named and set(named) < set(learned)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    before, after = flat(params), flat(optax.apply_updates(params, updates))
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == set(learned)


def test_the_side_branch_needs_less_memory_than_full_finetuning():
    """Compares the memory of compiled gradients; frozen blocks keep no activations."""
    deep = {"model.video.depth": 8, "model.text.depth": 8}

    def temporary_bytes(config: ExperimentConfig) -> int:
        model = build_model(config)

        def run(model):
            video = model.encode_video(BATCH.video)
            return (video.tokens**2).sum() + (video.frame_cls**2).sum()

        def loss(params):
            return model.apply({"params": freeze(params, config.model)}, method=run)

        params = jax.eval_shape(
            lambda: model.init(KEY, BATCH.video, method=lambda m, v: m.encode_video(v))["params"]
        )
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full = temporary_bytes(override(DEEP, deep))
    side = temporary_bytes(adapted("side", frozen=7, **deep))
    inline = temporary_bytes(adapted("inline", frozen=7, **deep))
    assert side < 0.7 * full
    assert side < inline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.video.adapter.frozen_blocks": 4},
            "--model.video.adapter.frozen-blocks=4",
        ),
        ({"model.text.adapter.frozen_blocks": -1}, "--model.text.adapter.frozen-blocks must"),
        ({"model.text.adapter.width": 6}, "--model.text.adapter.num-heads=4 does not divide"),
        (
            {
                "model.video.adapter.frozen_blocks": 2,
                "model.video.sparsify.stages": (1,),
                "model.video.sparsify.keep_rate": 0.5,
            },
            "--model.video.adapter.kind=inline",
        ),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=message):
        override(DEEP, changes)


# --- chunks of frames


@pytest.mark.parametrize("size", [1, 2])
def test_chunks_of_frames_change_nothing_but_memory(size):
    changes = {"model.video.sparsify.stages": (0,), "model.video.sparsify.keep_rate": 0.5}
    whole = override(SMALL, changes | {"model.video.sparsify.eval_keep_rate": 0.5})
    chunked = override(whole, {"model.video.frames_per_chunk": size})
    params = randomize(init_params(build_model(whole), BATCH))
    mask = sample_mask(build_model(whole), BATCH, KEY)

    def value_and_grad(config: ExperimentConfig):
        def loss(params):
            variables = {"params": params}
            video = build_model(config).apply(
                variables, BATCH.video, mask, method=lambda m, v, k: m.encode_video(v, k)
            )
            return (video.tokens**3).sum() + (video.frame_cls**2).sum(), video

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected, actual = value_and_grad(whole), value_and_grad(chunked)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), actual, expected
    )


def test_chunks_must_divide_the_frames():
    config = override(SMALL, {"model.video.frames_per_chunk": 3})
    with pytest.raises(ValueError, match="frames_per_chunk=3 does not divide clips of 4 frames"):
        init_params(build_model(config), BATCH)


@pytest.mark.parametrize(
    ("kind", "stream", "branch"), [("none", 0, 0), ("side", 0, 0), ("inline", 3, 0)]
)
def test_no_gradient_enters_a_frozen_block_but_with_inline_adapters(kind, stream, branch):
    """Of the stream and of the side branch, with an adapter that doubles its input."""

    def outputs(x):
        return ADAPTERS[kind](x, jnp.ones(()), lambda x: 2 * x)

    assert [float(x) for x in jax.jacrev(outputs)(jnp.asarray(5.0))] == [stream, branch]
    assert [float(x) for x in outputs(jnp.asarray(5.0))] == {
        "none": [5, 1],
        "side": [5, 11],
        "inline": [15, 1],
    }[kind]
