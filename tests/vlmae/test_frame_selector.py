"""The frame selector: the choice and its gradient against NumPy, and what a choice may know."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize, small_model
from oracles import dense, gelu, layer_norm, random, softmax
from sklearn.metrics import roc_auc_score

from vlmae import objectives
from vlmae.model_config import FrameSelectorConfig
from vlmae.models.frame_selector import FrameChoice, FrameSelector, keep_frames
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.sparsify import choose_frames, uniform_frames

KEY = jax.random.key(5)
MLP = FrameSelectorConfig("mlp")
PROBE = FrameSelectorConfig("transformer", width=8, depth=1, num_heads=2)


# --- the choice


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_best_frames_in_temporal_order(count):
    scores = random(20, 5)
    chosen = jax.jit(choose_frames, static_argnums=1)(scores, count)
    expected = np.sort(np.argsort(-scores, axis=1)[:, :count], axis=1)
    np.testing.assert_array_equal(chosen.frames, expected)
    np.testing.assert_array_equal(chosen.weights, np.ones((20, count)))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_gradient_of_the_choice_is_that_of_a_softmax_over_all_frames(count):
    """d/ds_i of sum_j c_j soft_j, where c is zero for frames that are not chosen."""
    scores, c = random(20, 5), random(20, 5, seed=1)

    def value(scores):
        chosen = choose_frames(scores, count)
        return (jnp.take_along_axis(jnp.asarray(c), chosen.frames, axis=1) * chosen.weights).sum()

    soft = softmax(scores)
    c_chosen = np.where(scores >= np.sort(scores)[:, -count, None], c, 0)
    expected = soft * (c_chosen - (c_chosen * soft).sum(axis=1, keepdims=True))
    gradient = jax.jit(jax.grad(value))(scores)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gumbel_noise_draws_frames_by_the_softmax_without_replacement():
    scores, draws = random(4), 20_000

    @partial(jax.jit, static_argnums=0)
    def share(count):
        """How often each frame is among `count` drawn ones."""
        noise = jax.random.gumbel(KEY, (draws, 4))
        frames = choose_frames(jnp.asarray(scores) + noise, count).frames
        return (frames[..., None] == jnp.arange(4)).any(axis=1).mean(axis=0)

    p = softmax(scores)
    in_two = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    # A share of 20,000 draws has a standard deviation of at most 0.0035.
    np.testing.assert_allclose(share(1), p, atol=0.015)
    np.testing.assert_allclose(share(2), in_two, atol=0.015)


def test_uniform_frames_are_the_middles_of_segments():
    assert uniform_frames(12, 4) == (1, 4, 7, 10)
    assert uniform_frames(4, 4) == (0, 1, 2, 3)
    assert uniform_frames(5, 2) == (1, 3)


# --- the module


def pairs(b: int = 6, t: int = 5) -> tuple[TextFeatures, VideoFeatures]:
    """Random features of texts and clips; the frames of a clip are told apart by their places."""
    text = TextFeatures(random(b, 4, 16), np.ones((b, 4), bool))
    places = np.tile(np.arange(3 * t, dtype=np.int32).reshape(t, 3), (b, 1, 1))
    removed = np.random.default_rng(0).random((b, t, 16)) < 0.5
    video = VideoFeatures(random(b, t, 3, 16, seed=1), random(b, t, 16, seed=2), (places,), removed)
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
    assert (choice.weights == 1).all()
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
    assert (np.diff(one.frames, axis=1) > 0).all() and (one.weights == 1).all()
    if kind == "uniform":
        np.testing.assert_array_equal(one.frames, np.tile([1, 3], (40, 1)))
        np.testing.assert_array_equal(other.frames, one.frames)
    else:
        assert (one.frames != other.frames).any()
        assert len(np.unique(one.frames)) == 5, "every frame may be drawn"


def test_kept_frames_take_everything_along():
    _, video = pairs(3)
    frames, weights = np.array([[0, 4], [1, 2], [2, 3]], np.int32), random(3, 2)
    choice = FrameChoice(jnp.asarray(frames), jnp.asarray(weights), jnp.zeros((3, 5)))
    kept = jax.jit(keep_frames)(video, choice)
    for i, j in np.ndindex(frames.shape):
        t = frames[i, j]
        np.testing.assert_array_equal(kept.frame_cls[i, j], video.frame_cls[i, t])
        np.testing.assert_array_equal(kept.stage_places[0][i, j], video.places[i, t])
        np.testing.assert_array_equal(kept.removed_mask[i, j], video.removed_mask[i, t])
        expected = weights[i, j] * video.tokens[i, t]
        np.testing.assert_allclose(kept.tokens[i, j], expected, rtol=1e-6)


# --- in the model


@pytest.fixture(scope="module")
def params():
    """Of the small model with an mlp selector."""
    return randomize(jax.jit(partial(init_params, small_model(selector=MLP)))(random_batch()))


def apply(params, run):
    """run(bound model), compiled."""
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
                text if selected_by == "text" else TextFeatures(frozen, text.mask), video
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
        ours, theirs = (
            objectives.extract(model, b, KEY, KEY, SMALL.objectives) for b in (batch, shuffled)
        )
        embeddings = [model.embed_video(features.video) for features in (ours, theirs)]
        compared = [objectives.embed(model, features) for features in (ours, theirs)]
        return embeddings, [objectives.vtc_logits(x) for x in compared]

    embeddings, logits = apply(params, run)
    assert embeddings[0].shape == (6, 4, 8), "every frame, chosen or not"
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    np.testing.assert_allclose(logits[1], logits[0][:, order], rtol=1e-5, atol=1e-5)


def test_matching_selects_the_frames_of_every_pair_by_its_own_text(params):
    """The loss of the objective, from pairs that are fused one at a time."""
    batch = random_batch(2, frames=8, seed=20)  # in which other words choose other frames
    pairs = [(0, 0), (1, 1), (1, 0), (0, 1)]  # of text and video

    def run(model: VideoLanguageModel):
        video = model.encode_video(batch.video)
        text = model.encode_text(batch.text_ids, batch.text_mask)
        features = objectives.Features(video, text)
        config = dataclasses.replace(SMALL.objectives, mlm=0.0)
        features = objectives.fuse_texts(model, features, batch, KEY, config)
        loss = objectives.vtm(model, features, batch, KEY, SMALL.objectives).value
        alone, frames = [], []
        for i, j in pairs:
            text = jax.tree.map(lambda x, i=i: x[i : i + 1], features.text)
            video = jax.tree.map(lambda x, j=j: x[j : j + 1], features.video)
            frames.append(model.choose_frames(text, video).frames[0])
            alone.append(jax.nn.log_softmax(model.match(model.fuse(text, video)))[0])
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
        frames = [model.choose_frames(t, video).frames for t in (text, other)]
        return frames, [model.match(model.fuse(t, video)) for t in (text, other)]

    frames, (true, shuffled) = apply(params, run)
    assert (frames[0] != frames[1]).any(), "the text decides"
    scores = np.concatenate([true, shuffled])
    labels = np.repeat([1, 0], 400)
    assert abs(roc_auc_score(labels, scores[:, 1] - scores[:, 0]) - 0.5) < 0.06
