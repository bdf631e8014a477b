"""Fusions of text and video; cross-attention (SMAUG) and concatenation stand here themselves.

A fusion is a module (config, text config, deterministic, compute) called with text, video and the
clips that the texts read. To add one: a class like these, and its line in `FUSIONS`.
"""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vlmae.config.model import FusionConfig, TextEncoderConfig
from vlmae.models.attention import Source
from vlmae.models.blocks import Block, bert_block
from vlmae.models.layers import Compute, Dense, to_width
from vlmae.models.multiway import MultiWayFusion
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.ops.registry import Registry


class BertFusion(nn.Module):
    """Fusion made of BERT blocks, whose output is one token for each token of the text.

    Attributes:
      condenses_text: False: the output keeps the text's tokens, and its padding.
      config: depth.
      text: the text encoder's sizes, which hold here too.
      deterministic: no dropout.
    """

    # On the class, not in the config: exports and heads ask it without building a model.
    condenses_text: ClassVar[bool] = False

    config: FusionConfig
    text: TextEncoderConfig
    deterministic: bool = True
    compute: Compute = Compute()

    def blocks(self) -> list[Block]:
        """Make the blocks."""
        return [
            bert_block(self.text, self.compute, f"block_{i}", self.deterministic)
            for i in range(self.config.depth)
        ]


class CrossAttentionFusion(BertFusion):
    """Blocks of text self-attention, cross-attention to all video tokens, feed-forward (SMAUG)."""

    @nn.compact
    def __call__(
        self, text: TextFeatures, video: VideoFeatures, rows: Int[Array, "p n"] | None = None
    ) -> Float[Array, "b l d"]:
        """Return the text tokens after they have read all frames; for `rows` see `Source`."""
        context = Source(rearrange(video.tokens, "b t m d -> b (t m) d"), rows)
        x = text.tokens
        for block in self.blocks():
            x = block(x, text.lengths, context)
        return x


class ConcatFusion(BertFusion):
    """Blocks of self-attention over all tokens of text and video together (as in ALPRO).

    Cost grows with the square of their number; a baseline for the others.
    """

    @nn.compact
    def __call__(
        self, text: TextFeatures, video: VideoFeatures, rows: Int[Array, "p n"] | None = None
    ) -> Float[Array, "b l d"]:
        """Return the text tokens after they have read all frames; for `rows` see `Source`."""
        embed = Dense(self.text.width, compute=self.compute, name="video_embed")
        # Projected before the gather: once a clip, however many texts read it.
        source = Source(to_width(embed, video.all_tokens), rows)
        clip = source.gather(source.tokens)
        x = jnp.concatenate([clip, text.tokens], axis=1)  # padding must come last
        for block in self.blocks():
            x = block(x, clip.shape[1] + text.lengths)
        return x[:, clip.shape[1] :]


FUSIONS: Registry[type[nn.Module]] = Registry(
    "fusion",
    {
        "cross_attention": CrossAttentionFusion,
        "concat": ConcatFusion,
        "multiway": MultiWayFusion,
    },
)
