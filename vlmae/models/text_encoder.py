"""Text encoder: the lower layers of a BERT, or CLIP's text tower (`TextLayout`)."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlmae.config.model import TextEncoderConfig
from vlmae.models.adapter import ShallowAdapters
from vlmae.models.blocks import bert_block
from vlmae.models.embeddings import BertEmbeddings
from vlmae.models.layers import Compute
from vlmae.ops.registry import Registry


class TextFeatures(NamedTuple):
    """Output of the text encoder."""

    tokens: Float[Array, "b l d"]  # [CLS] first; of a causal encoder the end-of-text token
    mask: Bool[Array, "b l"]  # True = valid; a prefix of each row

    @property
    def cls(self) -> Float[Array, "b d"]:
        """The [CLS] token."""
        return self.tokens[:, 0]

    @property
    def mean(self) -> Float[Array, "b d"]:
        """The mean of the valid tokens, [CLS] among them."""
        valid = self.mask[..., None].astype(self.tokens.dtype)
        return (self.tokens * valid).sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1)

    @property
    def lengths(self) -> Int[Array, " b"]:
        """Valid tokens of each row; at least one, so that no softmax is over nothing."""
        return jnp.maximum(self.mask.sum(axis=-1, dtype=jnp.int32), 1)


# One vector a text, for the shared contrastive space.
TEXT_POOLINGS: Registry[Callable[[TextFeatures], Array]] = Registry(
    "text pooling", {"cls": lambda text: text.cls, "mean": lambda text: text.mean}
)


class TextEncoder(nn.Module):
    """Embeddings and `config.depth` layers of BERT or, with such a layout, of CLIP.

    Attributes:
      config: sizes; `vocab_size` must be set.
      deterministic: no dropout.
    """

    config: TextEncoderConfig
    deterministic: bool = True
    compute: Compute = Compute()

    def setup(self) -> None:
        """Make the tables, the blocks and their adapters."""
        config, pre_norm = self.config, self.config.layout.pre_norm
        self.embeddings = BertEmbeddings(config, self.deterministic, self.compute, pre_norm)
        self.blocks = [
            bert_block(config, self.compute, f"block_{i}", self.deterministic, pre_norm)
            for i in range(config.depth)
        ]
        if pre_norm:
            self.norm = nn.LayerNorm(epsilon=config.layout.eps, dtype=self.compute.dtype)
        # Made even if nothing is frozen: parameters arise with a frozen block.
        self.adapters = ShallowAdapters(config.adapter, self.compute)

    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> TextFeatures:
        """Encode token ids; `mask` is True on valid tokens, which come first in each row."""
        features, layout = TextFeatures(self.embeddings(ids), mask), self.config.layout
        tokens, branch, lengths = features.tokens, None, features.lengths
        causal = causal_mask(ids) if layout.causal else None
        for i, block in enumerate(self.blocks):
            # Lengths, not a mask: padding comes last, and cuDNN's kernel takes lengths.
            tokens = block(tokens, lengths, mask=causal)
            tokens, branch = self.adapters(i, tokens, branch, lengths)
        if layout.pre_norm:
            tokens = self.norm(tokens)
        return TextFeatures(last_first(tokens, lengths) if layout.causal else tokens, mask)

    def token_logits(self, x: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Multiply by the word embedding table: float32 logits of a tied language-model head."""
        return self.embeddings.attend(x)


def causal_mask(ids: Int[Array, "b l"]) -> Bool[Array, "b l l"]:
    """Mask by which each token reads itself and those before it."""
    # Rows alike, yet a mask for each: the kernels take [b q k].
    rows, length = ids.shape  # in exports the number of rows is a symbol
    return jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))


def last_first(tokens: Float[Array, "b l d"], lengths: Int[Array, " b"]) -> Float[Array, "b l d"]:
    """Move the last valid token of each row to its front; those before it move on by one."""
    place, last = jnp.arange(tokens.shape[1]), lengths[:, None] - 1
    ids = jnp.where(place == 0, last, place - (place <= last))
    return jnp.take_along_axis(tokens, ids[..., None], axis=1)
