"""Where text and video meet: cross-attention (SMAUG), and one sequence of both to compare with."""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vlmae.model_config import FusionConfig, Remat, TextEncoderConfig
from vlmae.models.layers import Block, Dense, Source, to_width
from vlmae.models.text_encoder import TextFeatures, bert_block
from vlmae.models.video_encoder import VideoFeatures


class BertFusion(nn.Module):
    """A fusion made of BERT layers. `rows` says which clip each text reads, see `Source`.

    Attributes:
      config: depth.
      text: the text encoder's sizes, which hold here too.
      deterministic, remat, dtype, attention: see `Block` and `ModelConfig`.
    """

    config: FusionConfig
    text: TextEncoderConfig
    deterministic: bool = True
    remat: Remat = "none"
    dtype: str = "float32"
    attention: str = "xla"

    def _layer(self, i: int) -> Block:
        return bert_block(
            self.text,
            f"block_{i}",
            deterministic=self.deterministic,
            remat=self.remat,
            dtype=self.dtype,
            attention=self.attention,
        )


class CrossAttentionFusion(BertFusion):
    """Layers of text self-attention, cross-attention to all video tokens, feed-forward."""

    @nn.compact
    def __call__(
        self, text: TextFeatures, video: VideoFeatures, rows: Int[Array, "p n"] | None = None
    ) -> Float[Array, "b l d"]:
        """The text tokens after they have read the tokens of all frames."""
        context = Source(rearrange(video.tokens, "b t m d -> b (t m) d"), rows)
        x = text.tokens
        for i in range(self.config.depth):
            x = self._layer(i)(x, text.lengths, context)
        return x


class ConcatFusion(BertFusion):
    """BERT layers of self-attention over all tokens of text and video together (as in ALPRO).

    Its cost grows with the square of their number; a baseline for the others.
    """

    @nn.compact
    def __call__(
        self, text: TextFeatures, video: VideoFeatures, rows: Int[Array, "p n"] | None = None
    ) -> Float[Array, "b l d"]:
        """The text tokens after they have met the tokens of all frames."""
        embed = Dense(self.text.width, dtype=self.dtype, name="video_embed")
        source = Source(to_width(embed, video.all_tokens), rows)
        tokens = source.spread(source.tokens)
        x = jnp.concatenate([tokens, text.tokens], axis=1)  # padding must come last
        for i in range(self.config.depth):
            x = self._layer(i)(x, tokens.shape[1] + text.lengths)
        return x[:, tokens.shape[1] :]
