"""The multiway fusion (MuLTI) and fusion by concatenation against NumPy, and in whole models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIRST_WORD, SMALL, VOCAB, init_params, random_batch, small_model
from jax.extend.core import Jaxpr
from multiway_oracle import (
    DEPTH,
    KEY,
    LATENTS,
    LENGTHS,
    TEXT,
    WAYS,
    WIDTH,
    assert_close,
    float64,
    join,
    random_params,
    sampler,
    way_layer,
)
from oracles import attend, dense, feed_forward, layer_norm, random

from vlmae.config.model import FusionConfig, Remat, SamplerConfig
from vlmae.models.fusion import ConcatFusion, CrossAttentionFusion
from vlmae.models.layers import Compute
from vlmae.models.multiway import MultiWayFusion, WordReader
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.training.objectives import compute_losses
from vlmae.training.step_cost import inner_jaxprs

# --- the fusions


def features(video_width: int = WIDTH) -> tuple[TextFeatures, VideoFeatures]:
    """Texts of `LENGTHS` tokens, and clips of two frames of three tokens beside the [CLS]."""
    text = TextFeatures(random(4, 6, WIDTH), np.arange(6) < LENGTHS[:, None])
    video = VideoFeatures(
        tokens=random(4, 2, 3, video_width, seed=1),
        frame_cls=random(4, 2, video_width, seed=2),
        stage_patch_ids=(np.zeros((4, 2, 3), np.int32),),
        removed_mask=np.zeros((4, 2, 9), bool),
    )
    return jax.tree.map(jnp.asarray, (text, video))


def frame_tokens(video: VideoFeatures, p: dict) -> np.ndarray:
    """All tokens of a clip in a sequence, at the text's width."""
    frames = [join(video.frame_cls[:, t, None], video.tokens[:, t]) for t in range(2)]
    return dense(join(*frames), p["video_embed"]) if "video_embed" in p else join(*frames)


def multiway(remat: Remat = "none", deterministic: bool = True, **sampler) -> MultiWayFusion:
    config = FusionConfig("multiway", DEPTH, SamplerConfig(5, LATENTS, **sampler))
    return MultiWayFusion(config, TEXT, deterministic, Compute(remat=remat))


@pytest.fixture(scope="module")
def params():
    """Parameters of `multiway()`; guidance and rematerialization need no others."""
    return random_params(multiway().init, *features())


@pytest.mark.parametrize(
    ("guidance", "video_width"), [("context", WIDTH), ("queries", 12), ("none", WIDTH)]
)
def test_multiway_fusion(guidance, video_width):
    """The text's [CLS] leads, then come the latents of the text, then those of the video."""
    text, video = features(video_width)
    module = multiway(guidance=guidance)
    params = random_params(module.init, text, video)
    p, tokens = float64(params), np.float64(text.tokens)
    assert ("video_embed" in p) == (video_width != WIDTH)
    layers = {
        way: [(p[f"{way}_layers_{i}"], p[f"shared_attention_{i}"]) for i in range(DEPTH)]
        for way in WAYS
    }

    def condense(way: str, source, valid, *guide) -> np.ndarray:
        part = p[f"{way}_sampler"]
        return sampler(part["latents"], source, valid, "block", part, layers[way], *guide)

    words = condense("text", tokens, np.asarray(text.mask))
    clip = frame_tokens(video, p)
    frames = condense("video", clip, np.ones(clip.shape[:2], bool), words, guidance)
    z, nothing = join(tokens[:, :1], words, frames), np.zeros((4, 0, WIDTH))
    for layer in layers["fused"]:
        z = way_layer(z, nothing, np.zeros((4, 0), bool), *layer)
    fused = jax.jit(module.apply)({"params": params}, text, video)
    assert fused.shape == (4, 1 + LATENTS + 5, WIDTH)
    assert_close(fused, layer_norm(z, p["norm"]))


@pytest.mark.parametrize("rows", [[[0, 3, 3, 1, 2, 0, 1, 2]], [[0, 1, 1, 0], [1, 0, 1, 1]]])
@pytest.mark.parametrize("kind", ["multiway", "cross_attention", "concat"])
def test_texts_that_share_clips(kind, rows):
    """Sharing equals a copy of the clip for every text; of several parts, each reads its own."""
    kinds = {"cross_attention": CrossAttentionFusion, "concat": ConcatFusion}
    module = kinds[kind](FusionConfig(kind, DEPTH), TEXT) if kind in kinds else multiway()
    text, video = features()
    texts = jax.tree.map(lambda x: jnp.concatenate([x, x]), text)
    params, rows = random_params(module.init, text, video), jnp.array(rows)
    copied = (rows + jnp.arange(len(rows))[:, None] * (4 // len(rows))).ravel()

    def fuse(tokens: jax.Array, shared: bool):
        clips = video._replace(tokens=tokens)
        if not shared:
            clips = jax.tree.map(lambda x: x[copied], clips)
        fused = module.apply({"params": params}, texts, clips, rows if shared else None)
        return (fused**3).sum(), fused

    run = jax.jit(jax.grad(fuse, has_aux=True), static_argnums=1)
    assert_close(run(video.tokens, True), run(video.tokens, False), scale=100)


def loss_and_gradient(module: MultiWayFusion):
    def loss(params):
        return (module.apply({"params": params}, *features()) ** 3).sum()

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def expected(params):
    """Loss and gradient of `multiway()`."""
    return loss_and_gradient(multiway())(params)


def test_shared_attention_is_one_leaf_that_gets_the_gradients_of_all_ways(params, expected):
    names = [f"shared_attention_{i}" for i in range(DEPTH)]
    assert sorted(name for name in params if "attention" in name) == names
    assert not any("attention" in params[f"{way}_layers_{i}"] for way in WAYS for i in range(DEPTH))
    copies = {name: part for name, part in params.items() if name not in names}
    for way in WAYS:
        copies |= {f"{way}_attention_{i}": params[name] for i, name in enumerate(names)}
    loss, apart = loss_and_gradient(multiway(share_attention=False))(copies)
    for i, name in enumerate(names):
        parts = [apart.pop(f"{way}_attention_{i}") for way in WAYS]
        assert all(jnp.abs(part["out"]["kernel"]).max() > 1e-3 for part in parts)
        apart[name] = jax.tree.map(lambda *gradients: sum(gradients), *parts)
    assert_close((loss, apart), expected, scale=100)


def num_remats(jaxpr: Jaxpr) -> int:
    """Recomputed blocks of a program, as often as they are called."""
    inner = (num_remats(called) for eqn in jaxpr.eqns for called in inner_jaxprs(eqn))
    return sum(eqn.primitive.name == "remat2" for eqn in jaxpr.eqns) + sum(inner)


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_remat_changes_neither_loss_nor_gradient(remat, params, expected):
    run = loss_and_gradient(multiway(remat=remat))
    assert_close(run(params), expected, scale=100)
    assert num_remats(jax.make_jaxpr(run)(params).jaxpr) >= len(WAYS) * DEPTH


@pytest.mark.parametrize("guidance", ["context", "queries", "none"])
def test_the_text_guides_the_condensing_of_the_video(params, guidance):
    text, video = features()
    module = multiway(guidance=guidance)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_latents(tokens):
        _, state = module.apply(
            {"params": params},
            text._replace(tokens=tokens),
            video,
            capture_intermediates=lambda module, _: module.name == "video_sampler",
            mutable="intermediates",
        )
        latents = state["intermediates"]["video_sampler"]["__call__"][0]
        return (latents**3).sum(), latents

    gradient, before = gradient_and_latents(text.tokens)
    _, after = gradient_and_latents(1 - text.tokens)
    assert before.shape == (4, 5, WIDTH)
    assert (np.abs(before - after).max() > 1e-3) == (guidance != "none")
    assert (np.abs(gradient).max() > 1e-3) == (guidance != "none")


def test_dropout_works_in_training(params):
    module = multiway(deterministic=False)
    fuse = jax.jit(partial(module.apply, {"params": params}, *features()))
    one, other = (fuse(rngs={"dropout": jax.random.key(i)}) for i in range(2))
    assert np.abs(one - other).max() > 1e-3


def test_word_reader():
    text, fused = features()[0], random(4, 9, WIDTH, seed=3)
    params = random_params(WordReader(TEXT).init, text, fused)
    p, x = float64(params), np.float64(text.tokens)
    x = x + attend(layer_norm(x, p["norm"]), fused, np.ones((4, 9), bool), p["attention"])
    expected = x + feed_forward(layer_norm(x, p["mlp_norm"]), p["mlp"])
    assert_close(jax.jit(WordReader(TEXT).apply)({"params": params}, text, fused), expected)


@pytest.mark.parametrize("video_width", [WIDTH, 12])
def test_concat_fusion(video_width):
    """BERT layers over [text; video] under a mask; ours has the video first."""
    text, video = features(video_width)
    module = ConcatFusion(FusionConfig("concat", DEPTH), TEXT)
    params = random_params(module.init, text, video)
    p = float64(params)
    x = join(np.float64(text.tokens), frame_tokens(video, p))
    valid = np.pad(np.asarray(text.mask), ((0, 0), (0, 8)), constant_values=True)
    for i in range(DEPTH):
        layer = p[f"block_{i}"]
        read = attend(x, x, valid, layer["attention"])
        x = layer_norm(x + read, layer["attention_norm"], 1e-12)
        x = layer_norm(x + feed_forward(x, layer["mlp"]), layer["mlp_norm"], 1e-12)
    fused = jax.jit(module.apply)({"params": params}, text, video)
    assert fused.shape == text.tokens.shape
    assert_close(fused[text.mask], x[:, :6][text.mask])


# --- in whole models

FUSIONS = [FusionConfig("concat", 1), FusionConfig("multiway", 1, SamplerConfig(5, LATENTS))]


@pytest.fixture(scope="module", params=FUSIONS, ids=lambda config: config.kind)
def trained(request):
    """A model and its parameters."""
    model = small_model(fusion=request.param)
    params = random_params(lambda _: {"params": init_params(model, random_batch(4))})
    return model, params | {"temperature": jnp.asarray(0.07)}  # where nothing clamps it


def is_softmax_shift(path: str) -> bool:
    """True of biases that shift all logits of a softmax alike, and so change nothing."""
    key_bias = "['key']['bias']" in path
    return key_bias or ("['pooling']" in path and path.endswith("['bias']"))


def test_all_objectives_reach_every_parameter(trained):
    model, params = trained

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params):
        def run(model: VideoLanguageModel):
            loss = compute_losses(model, random_batch(4), KEY, SMALL.objectives)
            return loss.value, loss.metrics

        return model.apply({"params": params}, method=run)

    gradients, metrics = gradient(params)
    assert all(metrics[f"loss/{name}"] > 0 for name in ("vtc", "vtm", "mlm", "mvm"))
    for path, g in jax.tree.leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert (jnp.abs(g).max() > 1e-5) != is_softmax_shift(name), name


@pytest.fixture(scope="module")
def match(trained):
    """(ids, mask, video) -> logits of matching, compiled once for each shape."""

    def run(model: VideoLanguageModel, ids, mask, video):
        return model.match(model.fuse(model.encode_video(video), model.encode_text(ids, mask)))

    model, params = trained
    return jax.jit(partial(model.apply, {"params": params}, method=run))


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_every_frame_of_a_clip_of_any_length_counts(match, frames):
    batch = random_batch(4, frames)
    before = match(batch.text_ids, batch.text_mask, batch.video)
    assert before.shape == (4, 2)
    for t in range(frames):
        changed = batch.video.at[:, t].set(255 - batch.video[:, t])
        after = match(batch.text_ids, batch.text_mask, changed)
        assert (np.abs(after - before).max(axis=-1) > 1e-5).all(), t


def test_padding_words_change_no_match_logit(match):
    batch = random_batch(4)
    longer = np.random.default_rng(0).integers(FIRST_WORD, VOCAB, (4, 12), dtype=np.int32)
    mask = np.pad(batch.text_mask, ((0, 0), (0, 4)))
    longer[mask] = batch.text_ids[batch.text_mask]
    expected = match(batch.text_ids, batch.text_mask, batch.video)
    assert_close(match(longer, mask, batch.video), expected)
