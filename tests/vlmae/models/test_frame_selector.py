"""The frame selector: choice and gradient against NumPy; a choice depends on its own text only."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize, small_model
from oracles import dense, gelu, layer_norm, random, softmax
from sklearn.metrics import roc_auc_score

from experiments.benchmarks import scorer_gradient
from experiments.benchmarks.scorer_gradient import (
    READERS,
    clips_with_level,
    cosines,
    enumerate_choices,
)
from vlmae.config.model import FrameSelectorConfig
from vlmae.models.frame_selector import FrameChoice, FrameSelector, keep_frames
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops.token_pruning import choose_frames
from vlmae.training.features import Context, Features, extract, keys_of
from vlmae.training.pairs import embed, fuse_pairs, vtc_logits, vtm

KEY = jax.random.key(5)
KEYS = keys_of(KEY)
MLP = FrameSelectorConfig("mlp")
PROBE = FrameSelectorConfig("transformer", width=8, depth=1, num_heads=2)


# --- the choice


def test_gumbel_noise_draws_frames_by_the_softmax_without_replacement():
    scores, draws = random(4), 20_000

    @partial(jax.jit, static_argnums=0)
    def share(count):
        """Returns the frequency of each frame among `count` drawn ones."""
        noise = jax.random.gumbel(KEY, (draws, 4))
        frames = choose_frames(jnp.asarray(scores) + noise, count)
        return (frames[..., None] == jnp.arange(4)).any(axis=1).mean(axis=0)

    p = softmax(scores)
    in_two = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    # A share of 20,000 draws has a standard deviation of at most 0.0035.
    np.testing.assert_allclose(share(1), p, atol=0.015)
    np.testing.assert_allclose(share(2), in_two, atol=0.015)


# --- the module


def pairs(b: int = 6, t: int = 5) -> tuple[TextFeatures, VideoFeatures]:
    """Random features of texts and clips; patch ids tell the frames of a clip apart."""
    text = TextFeatures(random(b, 4, 16), np.ones((b, 4), bool))
    patch_ids = np.tile(np.arange(3 * t, dtype=np.int32).reshape(t, 3), (b, 1, 1))
    removed = np.random.default_rng(0).random((b, t, 16)) < 0.5
    video = VideoFeatures(
        random(b, t, 3, 16, seed=1), random(b, t, 16, seed=2), (patch_ids,), removed
    )
    return jax.tree.map(jnp.asarray, (text, video))


@pytest.fixture(scope="module", params=[MLP, PROBE], ids=lambda config: config.kind)
def scorer(request):
    """config, parameters, and (text, video) -> choice in evaluation."""
    module = FrameSelector(request.param)
    variables = randomize(jax.jit(module.init)(KEY, *pairs()))
    return request.param, variables, jax.jit(partial(module.apply, variables))


def test_mlp_scores_pair_by_pair():
    text, video = pairs()
    module = FrameSelector(MLP)
    variables = randomize(jax.jit(module.init)(KEY, text, video))
    scores = jax.jit(module.apply)(variables, text, video).scores
    p = jax.device_get(variables["params"])
    for i, t in np.ndindex(scores.shape):
        frame = layer_norm(np.asarray(video.frame_cls[i, t]), p["frame_norm"])
        word = layer_norm(np.asarray(text.tokens[i, 0]), p["text_norm"])
        hidden = gelu(dense(np.concatenate([frame, word]), p["hidden"]))
        expected = dense(hidden, p["score"])[0]
        np.testing.assert_allclose(scores[i, t], expected, rtol=1e-4, atol=1e-5)


def test_evaluation_keeps_the_best_half_whatever_the_key(scorer):
    choose = scorer[2]
    choice = choose(*pairs())
    expected = np.sort(np.argsort(-np.asarray(choice.scores), axis=1)[:, :2], axis=1)
    np.testing.assert_array_equal(choice.frames, expected)
    np.testing.assert_allclose(choice.swaps.sum(axis=2), 1, rtol=1e-5)
    for seed in range(2):
        noisy = choose(*pairs(), rngs={"noise": jax.random.key(seed)})
        np.testing.assert_array_equal(noisy.frames, choice.frames)


def test_training_draws_frames(scorer):
    config, variables, choose = scorer
    draw = jax.jit(partial(FrameSelector(config, deterministic=False).apply, variables))
    one, same, other = (
        draw(*pairs(40), rngs={"noise": jax.random.key(seed)}) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.frames, same.frames)
    assert (one.frames != other.frames).any()
    assert (np.diff(one.frames, axis=1) > 0).all(), "temporal order"
    np.testing.assert_allclose(one.scores, choose(*pairs(40)).scores, atol=1e-5)


def test_scores_follow_their_frames_and_depend_on_the_text(scorer):
    config, _, choose = scorer
    text, video = pairs()
    backwards = jax.tree.map(lambda x: x[:, ::-1], video)
    scores = choose(text, video).scores
    np.testing.assert_allclose(choose(text, backwards).scores, scores[:, ::-1], atol=1e-5)
    other_text = text._replace(tokens=text.tokens[::-1])
    assert (np.abs(choose(other_text, video).scores - scores) > 1e-4).all()
    other_frame = video._replace(frame_cls=video.frame_cls.at[:, 0].set(1.0))
    moved = np.abs(choose(text, other_frame).scores - scores)[:, 1:] > 1e-6
    assert moved.any() == (config.kind == "transformer"), "only the probe sees all frames together"


def test_a_choice_does_not_know_the_other_pairs(scorer):
    _, _, choose = scorer
    text, video = pairs(20)
    order = np.random.default_rng(0).permutation(20)
    choice = choose(text, video)
    permuted = choose(*jax.tree.map(lambda x: x[order], (text, video)))
    np.testing.assert_array_equal(permuted.frames, choice.frames[order])
    alone = choose(*jax.tree.map(lambda x: x.at[1:].set(x[:1]), (text, video)))
    np.testing.assert_array_equal(alone.frames[0], choice.frames[0])
    np.testing.assert_allclose(alone.scores[0], choice.scores[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "random"])
def test_baselines_need_no_parameters(kind):
    module = FrameSelector(FrameSelectorConfig(kind, frames=2), deterministic=False)
    assert not jax.eval_shape(module.init, KEY, *pairs())
    choose = jax.jit(lambda key: module.apply({}, *pairs(40), rngs={"noise": key}))
    one, other = choose(jax.random.key(0)), choose(jax.random.key(1))
    assert one.frames.shape == (40, 2) and not one.scores.any()
    assert (np.diff(one.frames, axis=1) > 0).all() and one.swaps is None
    if kind == "uniform":
        np.testing.assert_array_equal(one.frames, np.tile([1, 3], (40, 1)))
        np.testing.assert_array_equal(other.frames, one.frames)
    else:
        assert (one.frames != other.frames).any()
        assert len(np.unique(one.frames)) == 5, "every frame may be drawn"


def test_kept_frames_take_everything_along():
    _, video = pairs(3)
    frames = np.array([[0, 4], [1, 2], [2, 3]], np.int32)
    choice = FrameChoice(jnp.asarray(frames), jnp.zeros((3, 5)), jnp.asarray(random(3, 2, 5)))
    kept = jax.jit(keep_frames)(video, choice)
    for i, j in np.ndindex(frames.shape):
        t = frames[i, j]
        np.testing.assert_array_equal(kept.frame_cls[i, j], video.frame_cls[i, t])
        np.testing.assert_array_equal(kept.stage_patch_ids[0][i, j], video.patch_ids[i, t])
        np.testing.assert_array_equal(kept.removed_mask[i, j], video.removed_mask[i, t])
        np.testing.assert_array_equal(kept.tokens[i, j], video.tokens[i, t])


# --- the scorer's gradient against enumeration

SCORES = jnp.asarray(random(scorer_gradient.CLIPS, scorer_gradient.FRAMES, seed=7))


@functools.cache
def gradients_of(kind: str, pooling: str):
    """(scores, clips) -> gradients of the scores, read through a fusion; compiled once."""
    return enumerate_choices(scorer_gradient.fused_values(kind, pooling))


@pytest.mark.parametrize(("kind", "pooling"), READERS)
def test_the_scorer_gets_the_gradient_of_the_expected_loss(kind, pooling):
    """For every fusion and pooling, and whatever level the frames share.

    The estimator is a first-order one: frames that have nothing in common are its worst case.
    """
    for level, bound in ((0.0, 0.85), (2.0, 0.95)):
        estimate, true = gradients_of(kind, pooling)(SCORES, clips_with_level(level))
        cosine = cosines(estimate, true)
        assert np.median(cosine) > bound, (level, cosine)
        scale = (estimate * true).sum() / (true**2).sum()
        assert 0.5 < scale < 2, "of the right size too, up to what Adam takes out"


@pytest.mark.parametrize(("kind", "pooling"), READERS)
def test_equal_frames_give_the_scorer_no_gradient(kind, pooling):
    equal, other = (
        np.abs(gradients_of(kind, pooling)(SCORES, clips_with_level(level)).estimate)
        for level in (np.inf, 0.0)
    )
    assert equal.max() < 1e-6
    assert other.mean() > 1e-3


@pytest.mark.parametrize("level", [0.0, 5.0, -50.0])
def test_for_a_loss_linear_in_the_frames_the_estimator_is_nearly_exact(level):
    frames = jnp.asarray(random(*SCORES.shape, 1, 1, seed=5) + level)
    video = clips_with_level(0.0)._replace(tokens=frames)
    gradients = enumerate_choices(lambda video, c: keep_frames(video, c).tokens.sum((1, 2, 3)))
    assert cosines(*gradients(SCORES, video)).min() > 0.97


@pytest.mark.slow
def test_every_scorer_learns_through_every_fusion_and_pooling():
    """The table of docs/results.md, made anew."""
    count = 0
    for *names, near, near_parameters, far, far_parameters, equal in scorer_gradient.rows():
        count += 1
        assert min(float(near.split(" ")[0]), float(near_parameters)) >= 0.98, names
        assert float(far.split(" ")[0]) >= 0.9 and float(far_parameters) >= 0.65, names
        assert float(equal) < 1e-6, names
    assert count == 2 * len(READERS)


# --- in the model


@pytest.fixture(scope="module")
def params():
    """Parameters of the small model with an mlp selector."""
    return randomize(jax.jit(partial(init_params, small_model(selector=MLP)))(random_batch()))


def apply(params, run):
    """Calls run(bound model), compiled."""
    model = small_model(selector=MLP)
    return jax.jit(lambda params: model.apply({"params": params}, method=run))(params)


def test_images_bypass_the_selector(params):
    shapes = partial(jax.eval_shape, partial(init_params, small_model(selector=MLP)))
    assert set(shapes(random_batch(2))) == set(params)
    assert set(shapes(random_batch(2, frames=1))) == set(params) - {"frame_selector"}


@pytest.mark.parametrize("selected_by", ["text", "nothing"])
def test_the_scorer_learns_and_the_text_encoder_with_it(params, selected_by):
    """The fusion reads a text without gradient, so that only the selection carries any."""
    batch = random_batch(4, frames=4)

    @jax.jit
    @jax.grad
    def gradient(params):
        def loss(model: VideoLanguageModel):
            text = model.encode_text(batch.text_ids, batch.text_mask)
            video = model.encode_video(batch.video)
            frozen = jax.lax.stop_gradient(text.tokens)
            choice = model.choose_frames(
                video, text if selected_by == "text" else TextFeatures(frozen, text.mask)
            )
            fused = model.fusion(TextFeatures(frozen, text.mask), keep_frames(video, choice))
            return (fused**3).sum()

        return small_model(selector=MLP).apply({"params": params}, method=loss)

    grads = gradient(params)
    for path, g in jax.tree.leaves_with_path(grads["frame_selector"]):
        # The last bias shifts all scores alike, and the softmax forgets it.
        assert jnp.abs(g).max() > 1e-6 or "['score']['bias']" in jax.tree_util.keystr(path), path
    words = grads["text_encoder"]["block_0"]["mlp"]["up"]["kernel"]
    assert bool(words.any()) == (selected_by == "text")


def test_other_captions_do_not_change_the_embedding_of_a_video(params):
    batch = random_batch(frames=4)
    order = jnp.array([0, 5, 4, 3, 2, 1])  # of the captions; the first one stays

    def run(model: VideoLanguageModel):
        shuffled = batch._replace(text_ids=batch.text_ids[order], text_mask=batch.text_mask[order])
        ours, theirs = (extract(model, b, KEYS, SMALL.objectives) for b in (batch, shuffled))
        embeddings = [model.embed_video(features.video) for features in (ours, theirs)]
        compared = [embed(model, features, SMALL.objectives) for features in (ours, theirs)]
        return embeddings, [vtc_logits(x) for x in compared]

    embeddings, logits = apply(params, run)
    assert embeddings[0].shape == (6, 4, 8), "every frame, chosen or not"
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    np.testing.assert_allclose(logits[1], logits[0][:, order], rtol=1e-5, atol=1e-5)


def test_matching_selects_the_frames_of_every_pair_by_its_own_text(params):
    """Computes the loss of the objective from pairs that are fused one at a time."""
    batch = random_batch(2, frames=8, seed=20)  # in which other words choose other frames
    pairs = [(0, 0), (1, 1), (1, 0), (0, 1)]  # of text and video

    def run(model: VideoLanguageModel):
        video = model.encode_video(batch.video)
        text = model.encode_text(batch.text_ids, batch.text_mask)
        features = Features(video, text)
        config = dataclasses.replace(SMALL.objectives, mlm=0.0)
        features = fuse_pairs(model, features, Context(batch, KEY, config))
        loss = vtm(model, features, Context(batch, KEY, SMALL.objectives)).value
        alone, frames = [], []
        for i, j in pairs:
            text = jax.tree.map(lambda x, i=i: x[i : i + 1], features.text)
            video = jax.tree.map(lambda x, j=j: x[j : j + 1], features.video)
            frames.append(model.choose_frames(video, text).frames[0])
            alone.append(jax.nn.log_softmax(model.match(model.fuse(video, text)))[0])
        return loss, jnp.stack(alone), jnp.stack(frames)

    loss, log_p, frames = apply(params, run)
    assert (frames[:2] != frames[2:]).any(axis=1).all(), "the text decides"
    right, wrong = log_p[:2, 1], log_p[2:, 0]
    np.testing.assert_allclose(loss, -(right.sum() + 2 * wrong.sum()) / 6, rtol=1e-5)


def test_selection_does_not_reveal_which_pairs_are_true(params):
    """An untrained model scores 400 true and 400 shuffled pairs alike: the area is that of chance.

    Its standard deviation is at most sqrt(801 / (12 * 400 * 400)) = 0.02.
    """
    batch = random_batch(400, frames=4)
    shift = jnp.roll(jnp.arange(400), 1)

    def run(model: VideoLanguageModel):
        video = model.encode_video(batch.video)
        text = model.encode_text(batch.text_ids, batch.text_mask)
        other = jax.tree.map(lambda x: x[shift], text)
        frames = [model.choose_frames(video, t).frames for t in (text, other)]
        return frames, [model.match(model.fuse(video, t)) for t in (text, other)]

    frames, (true, shuffled) = apply(params, run)
    assert (frames[0] != frames[1]).any(), "the text decides"
    scores = np.concatenate([true, shuffled])
    labels = np.repeat([1, 0], 400)
    assert abs(roc_auc_score(labels, scores[:, 1] - scores[:, 0]) - 0.5) < 0.06
