"""Heads on top of the features: contrastive projection, token logits, classes, answers."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlmae.config.model import TextEncoderConfig
from vlmae.models.attention import Source
from vlmae.models.blocks import bert_block
from vlmae.models.embeddings import BertEmbeddings
from vlmae.models.layers import BERT_EPS, BERT_INIT, Compute, Dense
from vlmae.models.text_encoder import causal_mask
from vlmae.ops.losses import safe_norm


class Projection(nn.Module):
    """Linear map into the shared contrastive space, then unit length.

    In float32: similarities are divided by a small temperature, which magnifies rounding.

    Attributes:
      embed_dim: width of the shared space.
    """

    embed_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        """Project features to unit vectors."""
        # 1e-6 against a zero vector, which has no direction; `safe_norm` keeps its gradient finite.
        y = Dense(self.embed_dim, kernel_init=BERT_INIT, name="dense")(x.astype(jnp.float32))
        return y / jnp.maximum(safe_norm(y), 1e-6)


class WordTransform(nn.Module):
    """BERT's transform before the tied token logits: dense, exact GELU, layer norm.

    Attributes:
      compute: type of the activations.
    """

    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Transform every token alone."""
        x = Dense(x.shape[-1], compute=self.compute, kernel_init=BERT_INIT, name="dense")(x)
        # Exact, as BERT's: flax's default, the tanh approximation, differs by 4e-4 a layer.
        x = nn.gelu(x, approximate=False)
        return nn.LayerNorm(epsilon=BERT_EPS, dtype=self.compute.dtype, name="norm")(x)


class Classifier(nn.Module):
    """Two linear maps with an exact GELU between: d -> 2d -> classes; float32 (MuLTI).

    Attributes:
      num_classes: answers or labels.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b c"]:
        """Compute the logits of the classes."""
        x = x.astype(jnp.float32)
        x = Dense(2 * x.shape[-1], kernel_init=BERT_INIT, name="hidden")(x)
        x = nn.gelu(x, approximate=False)
        return Dense(self.num_classes, kernel_init=BERT_INIT, name="classes")(x)


class AnswerDecoder(nn.Module):
    """BERT decoder that writes an answer from the fused question and clip (as in Singularity).

    Causal self-attention, cross-attention to the fused tokens, tied logits; its embedding tables
    are its own.

    Attributes:
      text: the text encoder's sizes, which hold here too.
      depth: layers.
      deterministic: no dropout.
    """

    text: TextEncoderConfig
    depth: int
    deterministic: bool = True
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b a"],
        fused: Float[Array, "b q d"],
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b a v"]:
        """Compute float32 logits of the token after each of `ids`.

        Args:
          ids: token ids of the answer so far, [CLS] first.
          fused: tokens of the fused question and clip.
          lengths: valid ones of `fused`; None: all are.
        """
        text = self.text
        embeddings = BertEmbeddings(text, self.deterministic, self.compute, name="embeddings")
        # The causal mask rules out the fused kernel.
        compute = dataclasses.replace(self.compute, attention="xla")
        x, causal = embeddings(ids), causal_mask(ids)
        for i in range(self.depth):
            block = bert_block(text, compute, f"block_{i}", self.deterministic)
            x = block(x, None, Source(fused), causal, lengths)
        # Transform and bias of its own; only the table is tied, to the decoder's own embeddings.
        words = WordTransform(self.compute, name="word_transform")(x)
        bias = self.param("word_bias", nn.initializers.zeros, (text.vocab_size,))
        return embeddings.attend(words) + bias
