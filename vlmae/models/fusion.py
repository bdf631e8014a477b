"""Text tokens that read the video: the upper BERT layers with cross-attention (SMAUG, fusion)."""

import flax.linen as nn
from einops import rearrange
from jaxtyping import Array, Float

from vlmae.model_config import FusionConfig, TextEncoderConfig
from vlmae.models.text_encoder import TextFeatures, bert_block
from vlmae.models.video_encoder import VideoFeatures


class CrossAttentionFusion(nn.Module):
    """Layers of text self-attention, cross-attention to all video tokens, feed-forward.

    Attributes:
      config: depth.
      text: the text encoder's sizes, which hold here too.
      deterministic, remat, dtype, attention: see `Block` and `ModelConfig`.
    """

    config: FusionConfig
    text: TextEncoderConfig
    deterministic: bool = True
    remat: bool = False
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(self, text: TextFeatures, video: VideoFeatures) -> Float[Array, "b l d"]:
        """The text tokens after they have read the tokens of all frames."""
        context = rearrange(video.tokens, "b t m d -> b (t m) d")
        x = text.tokens
        for i in range(self.config.depth):
            x = bert_block(
                self.text,
                f"block_{i}",
                deterministic=self.deterministic,
                remat=self.remat,
                dtype=self.dtype,
                attention=self.attention,
            )(x, text.lengths, context)
        return x
