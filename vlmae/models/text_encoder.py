"""Words in, text tokens out: the lower layers of a BERT encoder (post-norm, exact GELU)."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlmae.model_config import Remat, TextEncoderConfig
from vlmae.models.adapter import ShallowAdapters
from vlmae.models.embeddings import BertEmbeddings
from vlmae.models.layers import BERT_EPS, BERT_INIT, Block, block_class


class TextFeatures(NamedTuple):
    """What leaves the text encoder."""

    tokens: Float[Array, "b l d"]  # [CLS] first
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
        """Valid tokens of each row; at least one, so that attention is never over nothing."""
        return jnp.maximum(self.mask.sum(axis=-1, dtype=jnp.int32), 1)


def bert_block(
    config: TextEncoderConfig,
    name: str,
    *,
    deterministic: bool = True,
    remat: Remat = "none",
    dtype: str = "float32",
    attention: str = "xla",
) -> Block:
    """A BERT layer, for the text encoder and the fusion alike."""
    return block_class(Block, remat)(
        config.num_heads,
        config.mlp_dim,
        pre_norm=False,
        eps=BERT_EPS,
        dropout=config.dropout,
        deterministic=deterministic,
        kernel_init=BERT_INIT,
        dtype=dtype,
        attention=attention,
        name=name,
    )


class TextEncoder(nn.Module):
    """BERT embeddings and `config.depth` layers.

    Attributes:
      config: sizes; `vocab_size` must be set.
      deterministic, remat, dtype, attention: see `Block` and `ModelConfig`.
    """

    config: TextEncoderConfig
    deterministic: bool = True
    remat: Remat = "none"
    dtype: str = "float32"
    attention: str = "xla"

    def setup(self):
        self.embeddings = BertEmbeddings(
            self.config.vocab_size,
            self.config.max_len,
            self.config.width,
            self.config.dropout,
            self.deterministic,
            self.dtype,
        )
        self.blocks = [
            bert_block(
                self.config,
                f"block_{i}",
                deterministic=self.deterministic,
                remat=self.remat,
                dtype=self.dtype,
                attention=self.attention,
            )
            for i in range(self.config.depth)
        ]
        self.adapters = ShallowAdapters(self.config.adapter, self.dtype, self.attention)

    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> TextFeatures:
        """Encodes word ids; `mask` is True on real tokens, which come first in each row."""
        features = TextFeatures(self.embeddings(ids), mask)
        tokens, branch = features.tokens, None
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, features.lengths)
            tokens, branch = self.adapters(i, tokens, branch, features.lengths)
        return TextFeatures(tokens, mask)

    def word_scores(self, x: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """The product with the word embedding table, for a tied language-model head."""
        return self.embeddings.attend(x)
