"""MultiWay-Sampler and its fusion: long sequences condensed to latents, then fused (MuLTI).

Text first, then the video guided by the text, then both together: three ways through layers that
share their attention and differ in their feed-forward networks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from einops import repeat
from jaxtyping import Array, Float, Int

from vlmae.config.model import FusionConfig, SamplerConfig, TextEncoderConfig
from vlmae.models.attention import Attention, Source
from vlmae.models.blocks import Mlp, block_class
from vlmae.models.layers import BERT_INIT, TOKEN_INIT, Compute, Dense, bert_init, to_width, vit_norm
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.ops.pooling import block_members, weighted_pool
from vlmae.ops.registry import Registry
from vlmae.parallel.sharding import keep_rows


class AdaptPooling(nn.Module):
    """Pools a source to one token a latent, which the latents start from (MuLTI, adapt-pooling).

    Attributes:
      kind: one of `POOLINGS`.
      num_heads: heads of the kind "attention".
    """

    kind: str
    num_heads: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b s d"],
        source: Float[Array, "b m d"],
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Pool the first `lengths` tokens of each row of `source`; None: all are valid."""
        return POOLINGS[self.kind](self, queries, source, lengths)

    def importance(self, x: Float[Array, "b m d"], count: int) -> Float[Array, "b c m"]:
        """Score tokens by `count` linear maps of LN(x), in float32."""
        # float32, as all scores by which a softmax weights tokens.
        scores = Dense(count, kernel_init=BERT_INIT, name="importance")(
            vit_norm("source_norm", self.compute.dtype)(x).astype(jnp.float32)
        )
        return scores.swapaxes(1, 2)


Lengths = Int[Array, " b"] | None


def valid_lengths(source: Array, lengths: Lengths) -> Int[Array, " b"]:
    """Return `lengths`; where they are None, the number of tokens of each row of `source`."""
    return jnp.full(source.shape[:1], source.shape[1]) if lengths is None else lengths


def pool_blocks(
    pooling: AdaptPooling, queries: Array, source: Array, lengths: Lengths, *, learned: bool = True
) -> Array:
    """Pool contiguous blocks by learned importance (v2), or all their tokens alike."""
    lengths = valid_lengths(source, lengths)
    # A contiguous block a latent: each starts from a place of its own in the sequence, the
    # "origin information" of the paper.
    members = block_members(lengths, source.shape[1], queries.shape[1])
    scores = pooling.importance(source, 1) if learned else jnp.zeros((1, 1, source.shape[1]))
    return weighted_pool(source, scores, members)


def pool_all(pooling: AdaptPooling, queries: Array, source: Array, lengths: Lengths) -> Array:
    """Pool all tokens once a latent, by importances of its own (ours)."""
    members = block_members(valid_lengths(source, lengths), source.shape[1], 1)  # one, of all
    return weighted_pool(source, pooling.importance(source, queries.shape[1]), members)


def pool_by_attention(
    pooling: AdaptPooling, queries: Array, source: Array, lengths: Lengths
) -> Array:
    """Let the queries attend to the source (v1)."""
    compute = pooling.compute
    init = bert_init(queries.shape[-1])
    attention = Attention(pooling.num_heads, init, compute, name="attention")
    normed = vit_norm("source_norm", compute.dtype)(source)
    return attention(vit_norm("norm", compute.dtype)(queries), normed, lengths).tokens


POOLINGS: Registry[Callable[..., Array]] = Registry(
    "pooling of the sampler",
    {
        "block": pool_blocks,
        "global": pool_all,
        "mean": functools.partial(pool_blocks, learned=False),  # no parameters
        "attention": pool_by_attention,
    },
)


class LatentLayer(nn.Module):
    """Latents read a source and themselves, then pass the feed-forward network of this way.

    h = z + attention(LN z, [LN z; LN source]); z = h + FFN(LN h). Without a source this is a
    pre-norm transformer block.

    Attributes:
      attention: a module of the parent, which other ways may share.
      mlp_dim: hidden width of the feed-forward network.
      dropout: on the output of both sublayers.
      deterministic: no dropout.
      compute: type of the activations.
    """

    attention: Attention
    mlp_dim: int
    dropout: float = 0.0
    deterministic: bool = True
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b s d"],
        source: Source | None = None,
        lengths: Int[Array, " b"] | None = None,
        guide: Float[Array, "b g d"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Return the latents after one layer.

        Args:
          z: latents.
          source: tokens to read, the valid ones first.
          lengths: valid tokens of each row of `source`; None: all are.
          guide: tokens that are read like those of the source, all valid.
        """
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        # One norm serves queries and the latents among keys, as in Flamingo's resampler.
        query = context = vit_norm("norm", self.compute.dtype)(z)
        if source is not None:
            norm = vit_norm("source_norm", self.compute.dtype)
            source = source._replace(tokens=norm(source.tokens))
            # The guide is normed like a source: to the attention it is one.
            if guide is not None:
                context = jnp.concatenate([query, norm(guide)], axis=1)
            # Padding must come last, so the latents go first.
            lengths = None if lengths is None else lengths + context.shape[1]
        z = keep_rows(z + drop(self.attention(query, context, lengths, source=source).tokens))
        mlp = Mlp(self.mlp_dim, bert_init(z.shape[-1]), self.compute, name="mlp")
        return keep_rows(z + drop(mlp(vit_norm("mlp_norm", self.compute.dtype)(z))))


# (latents, guide) -> (queries of the layers, tokens that join the keys and values)
GUIDANCES: Registry[Callable[[Array, Array], tuple[Array, Array | None]]] = Registry(
    "guidance",
    {
        "context": lambda z, guide: (z, guide),
        "queries": lambda z, guide: (jnp.concatenate([z, guide], axis=1), None),
        "none": lambda z, _: (z, None),
    },
)


class Sampler(nn.Module):
    """Condenses a sequence of any length to a fixed number of latents.

    With `pooling="none"` it is the plain resampler of Flamingo.

    Attributes:
      num_latents: learned queries.
      pooling: one of `POOLINGS`, or "none": the latents start from the queries alone.
      layers: the layers of this sampler's way, modules of the parent.
      num_heads: heads of the pooling "attention".
    """

    num_latents: int
    pooling: str
    layers: tuple[LatentLayer, ...]
    num_heads: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        source: Source,
        lengths: Int[Array, " b"] | None = None,
        guide: Float[Array, "b g d"] | None = None,
        guidance: str = "none",
    ) -> Float[Array, "b s d"]:
        """Return the latents of `source`.

        Args:
          source: tokens, the valid ones first.
          lengths: valid tokens of each row; None: all are.
          guide: latents of the other modality, all valid.
          guidance: one of `GUIDANCES`; "context": the guide joins the keys and values; "queries":
            it passes the layers as queries; "none": it is not read.
        """
        rows, _, d = source.tokens.shape
        # Learned and shared by all clips; what a clip adds comes by pooling (z = Q + P).
        queries = self.param("latents", TOKEN_INIT, (self.num_latents, d))
        # Repeated in float32: its gradient is a sum over all rows, which bfloat16 would round.
        z = repeat(queries, "s d -> b s d", b=rows).astype(self.compute.dtype)
        if self.pooling != "none":
            pool = AdaptPooling(self.pooling, self.num_heads, self.compute, name="pooling")
            z = z + pool(z, source.tokens, lengths)
        # Latents are pooled once a source row; only then they multiply to the rows that read it.
        z, context = GUIDANCES[guidance](source.gather(z), guide)
        for layer in self.layers:
            z = layer(z, source, lengths, context)
        # Guides that went along as queries have done their work and are dropped.
        return vit_norm("norm", self.compute.dtype)(z[:, : self.num_latents])


class MultiWayFusion(nn.Module):
    """Condenses text and video to latents and fuses these: MuLTI's MultiWay-Sampler and fusion.

    Cost grows linearly with the tokens of text and video.

    Attributes:
      condenses_text: True: the output holds latents, all valid, in place of the text's tokens.
      config: depth, latents, pooling, guidance, sharing.
      text: the text encoder's sizes, which hold here too.
      deterministic: no dropout.
    """

    condenses_text: ClassVar[bool] = True

    config: FusionConfig
    text: TextEncoderConfig
    deterministic: bool = True
    compute: Compute = Compute()

    def setup(self) -> None:
        """Make the attentions, then the layers of each way around them, then the samplers."""
        # Flax names an attention by the first attribute that holds it, so shared ones exist once.
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
        self.norm = vit_norm("norm", self.compute.dtype)
        self.video_embed = Dense(self.text.width, compute=self.compute)

    def _attentions(self) -> list[Attention]:
        return [
            Attention(self.text.num_heads, bert_init(self.text.width), self.compute)
            for _ in range(self.config.depth)
        ]

    def _layers(self, attentions: Sequence[Attention]) -> list[LatentLayer]:
        layer = block_class(LatentLayer, self.compute.remat)
        sizes = (self.text.mlp_dim, self.text.dropout, self.deterministic, self.compute)
        return [layer(attention, *sizes) for attention in attentions]

    def _sampler(self, num_latents: int, layers: Sequence[LatentLayer]) -> Sampler:
        pooling = self.config.sampler.pooling
        return Sampler(num_latents, pooling, layers, self.text.num_heads, self.compute)

    def __call__(
        self, text: TextFeatures, video: VideoFeatures, rows: Int[Array, "p n"] | None = None
    ) -> Float[Array, "b q d"]:
        """Return the fused [CLS] of the text, text latents and video latents, in this order.

        For `rows` see `Source`.
        """
        # To the text's width first, so that both modalities can share one attention.
        clip = to_width(self.video_embed, video.all_tokens)
        # Text first: it is short, and its latents guide what is taken from the video.
        text_latents = self.text_sampler(Source(text.tokens), text.lengths)
        video_latents = self.video_sampler(
            Source(clip, rows), guide=text_latents, guidance=self.config.sampler.guidance
        )
        # [CLS] leads as in BERT, so heads read position 0 whatever the fusion.
        z = jnp.concatenate([text.cls[:, None], text_latents, video_latents], axis=1)
        for layer in self.fused_layers:
            z = layer(z)
        return self.norm(z)


class WordReader(nn.Module):
    """Reads each token of a text back from the fused latents (as Perceiver IO decodes; ours).

    Masked language modeling needs every token, and a condensing fusion has none left.

    Attributes:
      text: the text encoder's sizes, which hold here too.
    """

    text: TextEncoderConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, text: TextFeatures, fused: Float[Array, "b q d"]) -> Float[Array, "b l d"]:
        """Return the text tokens after they have read the latents; cost linear in the tokens."""
        dtype = self.compute.dtype
        init = bert_init(self.text.width)
        read = Attention(self.text.num_heads, init, self.compute, name="attention")
        # Text tokens ask, so their number and padding stay; latents only answer.
        x = text.tokens + read(vit_norm("norm", dtype)(text.tokens), fused).tokens
        mlp = Mlp(self.text.mlp_dim, init, self.compute, name="mlp")
        return x + mlp(vit_norm("mlp_norm", dtype)(x))
