"""Words of an answer, one after the other, from what question and clip were fused to (SMAUG)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlmae.model_config import Remat, TextEncoderConfig
from vlmae.models.embeddings import BertEmbeddings
from vlmae.models.heads import WordTransform
from vlmae.models.layers import Source
from vlmae.models.text_encoder import bert_block


class AnswerDecoder(nn.Module):
    """A BERT decoder: causal self-attention, cross-attention to the fused tokens, tied word scores.

    The base system answers questions by one (Singularity); it has word embeddings of its own.

    Attributes:
      text: the text encoder's sizes, which hold here too.
      depth: layers.
      deterministic, remat, dtype: see `Block` and `ModelConfig`.
    """

    text: TextEncoderConfig
    depth: int
    deterministic: bool = True
    remat: Remat = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b a"],
        fused: Float[Array, "b q d"],
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b a v"]:
        """Logits of the word after each word, float32; `lengths` are the valid fused tokens."""
        text = self.text
        embeddings = BertEmbeddings(
            text.vocab_size,
            text.max_len,
            text.width,
            text.dropout,
            self.deterministic,
            self.dtype,
            name="embeddings",
        )
        x = embeddings(ids)
        a = ids.shape[1]
        causal = jnp.broadcast_to(jnp.tri(a, dtype=bool), (ids.shape[0], a, a))
        for i in range(self.depth):
            x = bert_block(
                text,
                f"block_{i}",
                deterministic=self.deterministic,
                remat=self.remat,
                dtype=self.dtype,
                attention="xla",  # the mask is nothing for the fused kernel
            )(x, None, Source(fused), causal, lengths)
        words = WordTransform(self.dtype, name="word_transform")(x)
        bias = self.param("word_bias", nn.initializers.zeros, (text.vocab_size,))
        return embeddings.attend(words).astype(jnp.float32) + bias
