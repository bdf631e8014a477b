"""Text-guided selection of the frames that the fusion reads (SMAUG)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import repeat
from jaxtyping import Array, Float, Int

from vlmae.config.model import FrameSelectorConfig
from vlmae.models.blocks import vit_block
from vlmae.models.layers import BERT_INIT, Compute, Dense, uniform_noise, vit_norm
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.ops.registry import Registry
from vlmae.ops.token_pruning import (
    choose_frames,
    straight_through,
    swap_probabilities,
    uniform_frames,
)


class FrameChoice(NamedTuple):
    """Frames of a clip that are kept for a text, with the scores of all its frames."""

    frames: Int[Array, "b K"]  # ascending
    scores: Float[Array, "b t"]  # without noise; zero if the kind has no scorer
    swaps: Float[Array, "b K t"] | None = None  # see `swap_probabilities`; None without scorer


class FrameSelector(nn.Module):
    """Keeps the best frames of each (text, clip) pair.

    Row i of text and video are a pair, so a selection never depends on another text of the batch.

    Attributes:
      config: kind of `SELECTORS`, sizes of the scorer, and the number of frames kept.
      deterministic: no noise; "random" then draws one set of frames for all clips.
      compute: type of the activations; scores are float32, and attention is XLA's.
    """

    config: FrameSelectorConfig
    deterministic: bool = True
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, text: TextFeatures, video: VideoFeatures) -> FrameChoice:
        """Choose `config.count(t)` of the t frames."""
        # A function of text and video, not a method by kind: adding one is a function and a line.
        return SELECTORS[self.config.kind].select(self, text, video)

    def score(self, x: Float[Array, "b t d"]) -> Float[Array, "b t"]:
        """Map each frame's features to a score, in float32: rounded scores would tie."""
        return Dense(1, kernel_init=BERT_INIT, name="score")(x.astype(jnp.float32))[..., 0]

    def dense(self, width: int, name: str) -> Dense:
        """Make a dense layer of a scorer."""
        return Dense(width, compute=self.compute, kernel_init=BERT_INIT, name=name)


def score_by_mlp(
    selector: FrameSelector, text: TextFeatures, video: VideoFeatures
) -> Float[Array, "b t"]:
    """Score frames by MLP([LN(frame [CLS]); LN(text [CLS])]) (ours)."""
    frames = vit_norm("frame_norm", selector.compute.dtype)(video.frame_cls)
    # A norm for each: text and frames come at scales of their own.
    sentence = vit_norm("text_norm", selector.compute.dtype)(text.cls)
    sentence = repeat(sentence, "b d -> b t d", t=frames.shape[1])
    pairs = jnp.concatenate([frames, sentence], axis=-1)
    hidden = nn.gelu(selector.dense(frames.shape[-1], "hidden")(pairs), approximate=False)
    return selector.score(hidden)


def score_by_transformer(
    selector: FrameSelector, text: TextFeatures, video: VideoFeatures
) -> Float[Array, "b t"]:
    """Score frames by blocks over [text [CLS]; all frame [CLS]] (Buch et al. 2022, ATP)."""
    config, dtype = selector.config, selector.compute.dtype
    frames = vit_norm("frame_norm", dtype)(video.frame_cls)
    frames = selector.dense(config.width, "frame_embed")(frames)
    sentence = selector.dense(config.width, "text_embed")(vit_norm("text_norm", dtype)(text.cls))
    # No positions: the frames are told apart by what they show, and their order does not choose.
    x = jnp.concatenate([sentence[:, None], frames], axis=1)
    for i in range(config.depth):
        # A few short sequences: neither a fused kernel nor rematerialization would pay.
        x = vit_block(config.num_heads, 4 * config.width, Compute(dtype), name=f"block_{i}")(x)
    return selector.score(vit_norm("norm", dtype)(x[:, 1:]))


def select_by_score(
    scorer: Callable[..., Array], selector: FrameSelector, text: TextFeatures, video: VideoFeatures
) -> FrameChoice:
    """Keep the frames of the highest scores; in training by Gumbel noise, straight-through."""
    scores = scorer(selector, text, video)
    noisy = scores
    if not selector.deterministic:
        # Only while training: a draw in proportion to softmax(scores) explores frames that score
        # low now.
        noisy += jax.random.gumbel(selector.make_rng("noise"), scores.shape)
    frames = choose_frames(noisy, selector.config.count(scores.shape[1]))
    # Probabilities without noise: the estimator compares choices at the scores, not at one draw.
    return FrameChoice(frames, scores, swap_probabilities(scores, frames))


def select_uniform(selector: FrameSelector, _: TextFeatures, video: VideoFeatures) -> FrameChoice:
    """Keep the middle frames of equal segments, a baseline."""
    b, t = video.frame_cls.shape[:2]
    frames = jnp.asarray(uniform_frames(t, selector.config.count(t)), jnp.int32)
    frames = repeat(frames, "k -> b k", b=b)
    return FrameChoice(frames, jnp.zeros((b, t)))


def select_random(selector: FrameSelector, _: TextFeatures, video: VideoFeatures) -> FrameChoice:
    """Keep frames drawn without replacement, a baseline."""
    b, t = video.frame_cls.shape[:2]
    frames = choose_frames(uniform_noise(selector, (b, t)), selector.config.count(t))
    return FrameChoice(frames, jnp.zeros((b, t)))


class Selector(NamedTuple):
    """A way to select frames."""

    select: Callable[[FrameSelector, TextFeatures, VideoFeatures], FrameChoice]
    has_parameters: bool


SELECTORS = Registry(
    "frame selector",
    {
        "mlp": Selector(functools.partial(select_by_score, score_by_mlp), True),
        "transformer": Selector(functools.partial(select_by_score, score_by_transformer), True),
        "uniform": Selector(select_uniform, False),
        "random": Selector(select_random, False),
    },
)


def keep_frames(video: VideoFeatures, choice: FrameChoice) -> VideoFeatures:
    """Gather the features of the chosen frames; tokens and [CLS] carry the scorer's gradient."""

    def take(x: Array) -> Array:
        ids = choice.frames.reshape(*choice.frames.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, ids, axis=1)

    # All fields, patch ids and masks too, so that a figure can still place every token.
    kept = jax.tree.map(take, video)
    if choice.swaps is None:
        return kept
    return kept._replace(
        tokens=straight_through(kept.tokens, video.tokens, choice.swaps),
        frame_cls=straight_through(kept.frame_cls, video.frame_cls, choice.swaps),
    )
