"""Long sequences condensed to latents and fused by the same attention (MuLTI).

Text first, then the video guided by the text, then both together: three ways through layers that
share their attention and differ in their feed-forward networks.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from einops import repeat
from jaxtyping import Array, Float, Int

from vlmae.model_config import FusionConfig, Remat, SamplerConfig, TextEncoderConfig
from vlmae.models.layers import (
    BERT_INIT,
    TOKEN_INIT,
    Attention,
    Dense,
    Mlp,
    Source,
    block_class,
    to_width,
    vit_norm,
)
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.pooling import block_members, valid_tokens, weighted_pool
from vlmae.sharding import keep_rows


class AdaptPooling(nn.Module):
    """What the latents start from: the source itself, pooled (MuLTI, adapt-pooling residual).

    Attributes:
      kind: "block" (v2): by learned importance within contiguous blocks; "mean": the mean of each
        block; "global": each latent by its own importances, over all tokens; "attention" (v1): the
        queries read the source.
      num_heads: heads of the kind "attention".
      dtype, attention: see `Attention`.
    """

    kind: str
    num_heads: int
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b s d"],
        source: Float[Array, "b m d"],
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b s d"]:
        """One pooled token for each query; tokens of `source` beyond `lengths` are not seen."""
        num_latents, num_tokens = queries.shape[1], source.shape[1]
        if self.kind == "attention":
            attention = Attention(
                self.num_heads, BERT_INIT, self.dtype, self.attention, name="attention"
            )
            normed = vit_norm("source_norm", self.dtype)(source)
            return attention(vit_norm("norm", self.dtype)(queries), normed, lengths).tokens
        if lengths is None:
            lengths = jnp.full(source.shape[:1], num_tokens)
        if self.kind == "global":
            scores = self._importance(source, num_latents)
            return weighted_pool(source, scores, valid_tokens(lengths, num_tokens))
        members = block_members(lengths, num_tokens, num_latents)
        if self.kind == "mean":
            return weighted_pool(source, jnp.zeros((1, 1, num_tokens)), members)
        return weighted_pool(source, self._importance(source, 1), members)

    def _importance(self, x: Float[Array, "b m d"], count: int) -> Float[Array, "b c m"]:
        """w . LN(x) + c, in float32."""
        scores = Dense(count, kernel_init=BERT_INIT, name="importance")(
            vit_norm("source_norm", self.dtype)(x).astype(jnp.float32)
        )
        return scores.swapaxes(1, 2)


class WayLayer(nn.Module):
    """Latents read a source and themselves, then go through this way's feed-forward network.

    h = z + attention(LN z, [LN z; LN source]); z = h + FFN(LN h). Without a source this is a
    pre-norm transformer block.

    Attributes:
      attention: a module of the parent, which other ways may share.
      mlp_dim: hidden width of the feed-forward network.
      dropout, deterministic, dtype: see `Block`.
    """

    attention: Attention
    mlp_dim: int
    dropout: float = 0.0
    deterministic: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b s d"],
        source: Source | None = None,
        lengths: Int[Array, " b"] | None = None,
        guide: Float[Array, "b g d"] | None = None,
    ) -> Float[Array, "b s d"]:
        """The latents after one layer.

        Args:
          z: latents.
          source: tokens to read, the valid ones first.
          lengths: valid tokens of each row of `source`; None: all are.
          guide: what is read like tokens of the source.
        """
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        query = context = vit_norm("norm", self.dtype)(z)
        if source is not None:
            norm = vit_norm("source_norm", self.dtype)
            source = source._replace(tokens=norm(source.tokens))
            if guide is not None:
                context = jnp.concatenate([query, norm(guide)], axis=1)
            # Padding must come last, so the latents go first.
            lengths = None if lengths is None else lengths + context.shape[1]
        z = keep_rows(z + drop(self.attention(query, context, lengths, source=source).tokens))
        mlp = Mlp(self.mlp_dim, BERT_INIT, self.dtype, name="mlp")
        return keep_rows(z + drop(mlp(vit_norm("mlp_norm", self.dtype)(z))))


class Sampler(nn.Module):
    """A sequence of any length condensed to a fixed number of latents.

    With `pooling="none"` it is the plain resampler of Flamingo.

    Attributes:
      num_latents: learned queries.
      pooling: kind of `AdaptPooling`, or "none": the latents start from the queries alone.
      layers: the layers of this sampler's way, modules of the parent.
      num_heads, dtype, attention: see `AdaptPooling`.
    """

    num_latents: int
    pooling: str
    layers: tuple[WayLayer, ...]
    num_heads: int
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        source: Source,
        lengths: Int[Array, " b"] | None = None,
        guide: Float[Array, "b g d"] | None = None,
        guide_in: str = "none",
    ) -> Float[Array, "b s d"]:
        """The latents of `source`.

        Args:
          source: tokens, the valid ones first.
          lengths: valid tokens of each row; None: all are.
          guide: latents of the other modality, all valid.
          guide_in: "context": they join the keys and values; "queries": they go through the layers
            as queries; "none".
        """
        rows, _, d = source.tokens.shape
        queries = self.param("latents", TOKEN_INIT, (self.num_latents, d)).astype(self.dtype)
        z = repeat(queries, "s d -> b s d", b=rows)
        if self.pooling != "none":
            pool = AdaptPooling(
                self.pooling, self.num_heads, self.dtype, self.attention, name="pooling"
            )
            z = z + pool(z, source.tokens, lengths)
        z = source.spread(z)
        if guide is not None and guide_in == "queries":
            z = jnp.concatenate([z, guide], axis=1)
        for layer in self.layers:
            z = layer(z, source, lengths, guide if guide_in == "context" else None)
        return vit_norm("norm", self.dtype)(z[:, : self.num_latents])


class MultiWayFusion(nn.Module):
    """Text and video condensed, then fused: MuLTI's MultiWay-Sampler and its fusion.

    Cost grows linearly with the tokens of text and video, whatever their number.

    Attributes:
      config: depth, latents, pooling, guidance, sharing.
      text: the text encoder's sizes, which hold here too.
      deterministic, remat, dtype, attention: see `Block` and `ModelConfig`.
    """

    config: FusionConfig
    text: TextEncoderConfig
    deterministic: bool = True
    remat: Remat = "none"
    dtype: str = "float32"
    attention: str = "xla"

    def setup(self):
        sampler: SamplerConfig = self.config.sampler
        if sampler.share_attention:
            self.shared_attention = self._attentions()
            text = video = fused = self.shared_attention
        else:
            self.text_attention = text = self._attentions()
            self.video_attention = video = self._attentions()
            self.fused_attention = fused = self._attentions()
        self.text_layers, self.video_layers = self._layers(text), self._layers(video)
        self.fused_layers = self._layers(fused)
        self.text_sampler = self._sampler(sampler.text_latents, self.text_layers)
        self.video_sampler = self._sampler(sampler.video_latents, self.video_layers)
        self.norm = vit_norm("norm", self.dtype)
        self.video_embed = Dense(self.text.width, dtype=self.dtype)

    def _attentions(self) -> list[Attention]:
        return [
            Attention(self.text.num_heads, BERT_INIT, self.dtype, self.attention)
            for _ in range(self.config.depth)
        ]

    def _layers(self, attentions: Sequence[Attention]) -> list[WayLayer]:
        layer = block_class(WayLayer, self.remat)
        sizes = (self.text.mlp_dim, self.text.dropout, self.deterministic, self.dtype)
        return [layer(attention, *sizes) for attention in attentions]

    def _sampler(self, num_latents: int, layers: Sequence[WayLayer]) -> Sampler:
        pooling, num_heads = self.config.sampler.pooling, self.text.num_heads
        return Sampler(num_latents, pooling, layers, num_heads, self.dtype, self.attention)

    def __call__(
        self, text: TextFeatures, video: VideoFeatures, rows: Int[Array, "p n"] | None = None
    ) -> Float[Array, "b q d"]:
        """The text's [CLS], the text latents and the video latents, after they have met.

        `rows` says which clip each text reads, see `Source`.
        """
        tokens = to_width(self.video_embed, video.all_tokens)
        words = self.text_sampler(Source(text.tokens), text.lengths)
        guidance = self.config.sampler.guidance
        frames = self.video_sampler(Source(tokens, rows), guide=words, guide_in=guidance)
        z = jnp.concatenate([text.cls[:, None], words, frames], axis=1)
        for layer in self.fused_layers:
            z = layer(z)
        return self.norm(z)


class WordReader(nn.Module):
    """The words of a text, each read back from the fused latents (as Perceiver IO decodes; ours).

    Masked language modeling needs every word, and the fusion has condensed them.
    """

    text: TextEncoderConfig
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(self, text: TextFeatures, fused: Float[Array, "b q d"]) -> Float[Array, "b l d"]:
        """Text tokens that have read the fused ones; cost linear in the words."""
        read = Attention(
            self.text.num_heads, BERT_INIT, self.dtype, self.attention, name="attention"
        )
        x = text.tokens + read(vit_norm("norm", self.dtype)(text.tokens), fused).tokens
        mlp = Mlp(self.text.mlp_dim, BERT_INIT, self.dtype, name="mlp")
        return x + mlp(vit_norm("mlp_norm", self.dtype)(x))
