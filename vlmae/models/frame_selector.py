"""Which frames the fusion reads: chosen for the text (SMAUG, frame selection)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import repeat
from jaxtyping import Array, Float, Int

from vlmae.model_config import FrameSelectorConfig
from vlmae.models.layers import BERT_INIT, Dense, uniform_noise, vit_block, vit_norm
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.sparsify import ChosenFrames, choose_frames, uniform_frames


class FrameChoice(NamedTuple):
    """The frames of a clip that are kept for a text, and the scores of all of them."""

    frames: Int[Array, "b K"]  # ascending
    weights: Float[Array, "b K"]  # all 1; they carry the scorer's gradient
    scores: Float[Array, "b t"]  # without noise; zero where nothing is scored


class FrameSelector(nn.Module):
    """Scores the frames of each (text, clip) pair and chooses the best.

    In training Gumbel noise is added and the gradient passes straight through; in evaluation the
    choice is deterministic ("random" draws one set of frames for all clips). Row i of text and
    video are a pair, so a selection never knows another text of the batch.

    Attributes:
      config: kind and sizes of the scorer, and how many frames are kept.
      deterministic: no noise.
      dtype: type of the activations; scores are float32.
    """

    config: FrameSelectorConfig
    deterministic: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, text: TextFeatures, video: VideoFeatures) -> FrameChoice:
        """Chooses `config.count(t)` of the t frames."""
        b, t = video.frame_cls.shape[:2]
        count, zeros = self.config.count(t), jnp.zeros((b, t))
        if self.config.kind == "uniform":
            frames = jnp.asarray(uniform_frames(t, count), jnp.int32)
            return FrameChoice(repeat(frames, "k -> b k", b=b), jnp.ones((b, count)), zeros)
        if self.config.kind == "random":
            frames = choose_frames(uniform_noise(self, (b, t)), count).frames
            return FrameChoice(frames, jnp.ones((b, count)), zeros)
        scorer = {"mlp": self._mlp, "transformer": self._transformer}[self.config.kind]
        scores = scorer(text, video).astype(jnp.float32)
        noisy = scores
        if not self.deterministic:
            noisy += jax.random.gumbel(self.make_rng("noise"), scores.shape)
        chosen: ChosenFrames = choose_frames(noisy, count)
        return FrameChoice(chosen.frames, chosen.weights, scores)

    def _mlp(self, text: TextFeatures, video: VideoFeatures) -> Float[Array, "b t"]:
        """MLP([LN(frame [CLS]); LN(text [CLS])])."""
        frames = vit_norm("frame_norm", self.dtype)(video.frame_cls)
        words = vit_norm("text_norm", self.dtype)(text.cls)
        words = repeat(words, "b d -> b t d", t=frames.shape[1])
        hidden = self._dense(frames.shape[-1], "hidden")(jnp.concatenate([frames, words], axis=-1))
        return self._dense(1, "score")(nn.gelu(hidden, approximate=False))[..., 0]

    def _transformer(self, text: TextFeatures, video: VideoFeatures) -> Float[Array, "b t"]:
        """Blocks over [text [CLS]; all frame [CLS]] (the atemporal probe, Buch et al. 2022)."""
        width = self.config.width
        frames = vit_norm("frame_norm", self.dtype)(video.frame_cls)
        frames = self._dense(width, "frame_embed")(frames)
        words = self._dense(width, "text_embed")(vit_norm("text_norm", self.dtype)(text.cls))
        x = jnp.concatenate([words[:, None], frames], axis=1)
        for i in range(self.config.depth):
            x = vit_block(
                self.config.num_heads,
                4 * width,
                f"block_{i}",
                remat="none",
                dtype=self.dtype,
                attention="xla",
            )(x)
        return self._dense(1, "score")(vit_norm("norm", self.dtype)(x[:, 1:]))[..., 0]

    def _dense(self, width: int, name: str) -> nn.Dense:
        return Dense(width, dtype=self.dtype, kernel_init=BERT_INIT, name=name)


def keep_frames(video: VideoFeatures, choice: FrameChoice) -> VideoFeatures:
    """The features of the chosen frames; the tokens carry the gradient into the scores."""

    def take(x: Array) -> Array:
        ids = choice.frames.reshape(*choice.frames.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, ids, axis=1)

    kept = jax.tree.map(take, video)
    weights = choice.weights[:, :, None, None].astype(video.tokens.dtype)
    return kept._replace(tokens=kept.tokens * weights)
