"""A ViT block that thins its tokens between attention and feed-forward network (SMAUG, EViT)."""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from vlmae import sparsify
from vlmae.model_config import SparsifyConfig
from vlmae.models.layers import Attended, Block, uniform_noise
from vlmae.sparsify import Survivors


class ThinningBlock(Block):
    """A `Block` after whose attention only the important tokens live on.

    Attributes:
      sparsify: score, and what becomes of the rest.
      keep_rate: fraction of the tokens kept.
    """

    sparsify: SparsifyConfig = SparsifyConfig()
    keep_rate: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "f q d"],
        places: Int[Array, "f m"],
        bias: Float[Array, "f h q q"] | None = None,
    ) -> Survivors:
        """`x` has [CLS] first; `places` says where the others stand; `bias` is attention's."""
        attended = self.self_attention(x, bias=bias)
        survivors = sparsify.thin(
            attended.tokens,
            places,
            self._scores(attended, bias),
            keep_rate=self.keep_rate,
            rest=self.sparsify.rest,
        )
        return survivors._replace(tokens=self.feed_forward(survivors.tokens))

    def _scores(self, attended: Attended, bias: Array | None) -> Float[Array, "f m"]:
        score = self.sparsify.score
        if score == "cls_attention":
            return sparsify.cls_attention(attended.query, attended.key, bias)
        if score == "mean_attention":
            return sparsify.mean_attention(attended.query, attended.key, bias)
        if score == "norm":
            return sparsify.norm_score(attended.tokens[:, 1:])
        shape = (attended.tokens.shape[0], attended.tokens.shape[1] - 1)
        return sparsify.random_score(uniform_noise(self, shape))
