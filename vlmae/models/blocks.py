"""Feed-forward network and transformer block, the only ones of the library; a block that prunes."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float, Int

from vlmae.config.model import Remat, SparsifyConfig, TextEncoderConfig
from vlmae.models.attention import Attended, Attention, Source
from vlmae.models.layers import (
    DENSE_OUTPUT,
    VIT_EPS,
    VIT_INIT,
    Compute,
    Dense,
    bert_init,
    uniform_noise,
)
from vlmae.ops import token_pruning
from vlmae.ops.registry import Registry
from vlmae.parallel.sharding import keep_rows

ACTIVATIONS: Registry[Callable[[Array], Array]] = Registry(
    "activation",
    {
        "gelu": functools.partial(nn.gelu, approximate=False),  # exact, as in BERT and ViT
        "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP
        "gelu_tanh": functools.partial(nn.gelu, approximate=True),  # SigLIP
    },
)


class Mlp(nn.Module):
    """Two dense layers with an activation between them.

    Attributes:
      hidden_dim: width between the layers.
      kernel_init: initializer of both.
      compute: type of the activations.
      activation: one of `ACTIVATIONS`.
    """

    hidden_dim: int
    kernel_init: Callable = VIT_INIT
    compute: Compute = Compute()
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Map every token alone: d -> hidden_dim -> d."""
        dense = functools.partial(Dense, compute=self.compute, kernel_init=self.kernel_init)
        hidden = ACTIVATIONS[self.activation](dense(self.hidden_dim, name="up")(x))
        return dense(x.shape[-1], name="down")(hidden)


class Block(nn.Module):
    """Transformer block: self-attention, cross-attention if there is a context, feed-forward.

    Pre-norm (ViT): x = x + f(LN x). Post-norm (BERT): x = LN(x + f(x)).

    Attributes:
      num_heads, mlp_dim: sizes of attention and feed-forward network.
      pre_norm: normalize before each sublayer (ViT) or after its residual sum (BERT).
      eps: of the layer norms.
      dropout: on the output of each sublayer.
      deterministic: no dropout.
      kernel_init: of all dense layers.
      activation: of the feed-forward network, one of `ACTIVATIONS`.
      layer_scale: initial factor of each sublayer's output, learned by channel; 0 has none.
    """

    num_heads: int
    mlp_dim: int
    pre_norm: bool
    eps: float
    dropout: float = 0.0
    deterministic: bool = True
    kernel_init: Callable = VIT_INIT
    compute: Compute = Compute()
    activation: str = "gelu"
    layer_scale: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        lengths: Int[Array, " b"] | None = None,
        context: Source | None = None,
        mask: Bool[Array, "b l l"] | None = None,
        context_lengths: Int[Array, " b"] | None = None,
        bias: Float[Array, "b #h #l l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Apply all sublayers in turn.

        Args:
          x: tokens.
          lengths: valid tokens at the front of each row of `x`; None: all are.
          context: tokens that cross-attention reads; None: there is no cross-attention.
          mask: True where a token may attend to another in self-attention.
          context_lengths: valid tokens at the front of each row of `context`; None: all are.
          bias: added to the logits of self-attention.
        """
        # Cross-attention in the middle, as in BERT decoders and BLIP, whose weights fit.
        x = self.self_attention(x, lengths, mask, bias).tokens
        if context is not None:
            attend = self._attention("cross_attention")
            y = self._normalized("cross_attention", x, before=True)
            attended = attend(y, None, context_lengths, source=context)
            x = self._added("cross_attention", x, attended.tokens)
        return self.feed_forward(x)

    def self_attention(
        self,
        x: Float[Array, "b l d"],
        lengths: Int[Array, " b"] | None = None,
        mask: Bool[Array, "b l l"] | None = None,
        bias: Float[Array, "b #h #l l"] | None = None,
    ) -> Attended:
        """Apply the first sublayer, with its residual sum; see `__call__`.

        It is a method of its own, as `feed_forward` is, for blocks that work between the two.
        """
        y = self._normalized("attention", x, before=True)
        attended = self._attention("attention")(y, y, lengths, mask, bias)
        return attended._replace(tokens=self._added("attention", x, attended.tokens))

    def feed_forward(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Apply the last sublayer, with its residual sum."""
        mlp = Mlp(self.mlp_dim, self.kernel_init, self.compute, self.activation, name="mlp")
        return self._added("mlp", x, mlp(self._normalized("mlp", x, before=True)))

    def _added(self, name: str, x: Array, y: Array) -> Array:
        """Add the output y of the sublayer `name` to its input x."""
        if self.layer_scale:
            # By channel, learned, and on the residual branch alone (DINOv2, BEiT).
            initial = nn.initializers.constant(self.layer_scale)
            y = (y * self.param(f"{name}_scale", initial, y.shape[-1:])).astype(x.dtype)
        # XLA may otherwise shard activations like the parameters that made them.
        x = keep_rows(x + nn.Dropout(self.dropout, deterministic=self.deterministic)(y))
        return self._normalized(name, x, before=False)

    def _normalized(self, name: str, x: Array, *, before: bool) -> Array:
        """Normalize x before the sublayer `name` (pre-norm) or after its sum (post-norm)."""
        if before != self.pre_norm:
            return x
        return nn.LayerNorm(epsilon=self.eps, dtype=self.compute.dtype, name=f"{name}_norm")(x)

    def _attention(self, name: str) -> Attention:
        return Attention(self.num_heads, self.kernel_init, self.compute, name=name)


# (output of self-attention, its bias, a function that draws noise [f m]) -> scores [f m]. Noise is
# drawn on demand: a score that needs none must not advance the random stream.
Score = Callable[[Attended, Array | None, Callable[[], Array]], Array]
SCORES: Registry[Score] = Registry(
    "score of tokens",
    {
        "cls_attention": lambda x, bias, _: token_pruning.cls_attention(x.query, x.key, bias),
        "mean_attention": lambda x, bias, _: token_pruning.mean_attention(x.query, x.key, bias),
        "norm": lambda x, _, __: token_pruning.norm_score(x.tokens[:, 1:]),
        "random": lambda _, __, noise: token_pruning.random_score(noise()),
    },
)


class PruningBlock(Block):
    """ViT block that prunes or merges the tokens of a frame between attention and MLP.

    Only the tokens of the highest scores go on (SMAUG, EViT), or similar ones are averaged (ToMe).

    Attributes:
      sparsify: score, and what becomes of the other tokens.
      keep_rate: fraction of the tokens kept.
    """

    sparsify: SparsifyConfig = SparsifyConfig()
    keep_rate: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "f q d"],
        patch_ids: Int[Array, "f m"],
        sizes: Float[Array, "f m"] | None = None,
        bias: Float[Array, "f #h #q q"] | None = None,
    ) -> token_pruning.PrunedTokens:
        """Apply attention, pruning and MLP to the tokens of each frame.

        Args:
          x: tokens, [CLS] first.
          patch_ids: patch of each token but [CLS].
          sizes: patches merged to each token but [CLS]; None: one each.
          bias: added to the logits of attention.
        """
        # Between attention and MLP (EViT): the scores are at hand, and the MLP, two thirds of a
        # block, already runs on the kept tokens.
        attended = self.self_attention(x, bias=bias)
        if self.sparsify.rest == "merge":
            keys = attended.key[:, 1:].mean(axis=2)
            merged = token_pruning.merge(attended.tokens, patch_ids, sizes, keys, self.keep_rate)
            return merged._replace(tokens=self.feed_forward(merged.tokens))
        noise = functools.partial(uniform_noise, self, patch_ids.shape)
        pruned = token_pruning.prune(
            attended.tokens,
            patch_ids,
            SCORES[self.sparsify.score](attended, bias, noise),
            keep_rate=self.keep_rate,
            rest=self.sparsify.rest,
        )
        return pruned._replace(tokens=self.feed_forward(pruned.tokens))


REMATS: Registry[Callable[[type[nn.Module]], type[nn.Module]]] = Registry(
    "remat",
    {
        "none": lambda kind: kind,
        # Products of activations with parameters have no batch dimension, those of attention have.
        # Those of bfloat16 layers hide in a function with a gradient of its own, and have a name.
        "selective": functools.partial(
            nn.remat,
            policy=jax.checkpoint_policies.save_from_both_policies(
                jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                jax.checkpoint_policies.save_only_these_names(DENSE_OUTPUT),
            ),
        ),
        # Saves the most memory, for about a third more FLOPs.
        "full": nn.remat,
    },
)


@functools.cache
def block_class(kind: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """Wrap a class of blocks so that equal blocks are traced once, which a deep model needs.

    In a profile all of them bear the name of the first. With `remat` the backward pass recomputes
    activations of the block instead of keeping them.
    """
    # nn.jit, not nn.scan over stacked parameters: pruning gives blocks other shapes, and each block
    # keeps a name, which weights and sharding rules use.
    return nn.jit(REMATS[remat](kind))


def vit_block(
    num_heads: int, mlp_dim: int, compute: Compute, kind: type[Block] = Block, **fields: Any
) -> Block:
    """Make a ViT block (pre-norm, MAE's epsilon), for every part of the model that is no BERT.

    `fields` are further fields of `kind`, and its name.
    """
    # Defaults first, so that a layout's own epsilon wins.
    fields = {"pre_norm": True, "eps": VIT_EPS} | fields
    return block_class(kind, compute.remat)(num_heads, mlp_dim, compute=compute, **fields)


def bert_block(
    config: TextEncoderConfig,
    compute: Compute,
    name: str,
    deterministic: bool = True,
    pre_norm: bool = False,
) -> Block:
    """Make a block of the text's sizes, for text encoder, fusion and answer decoder alike.

    Only the text encoder is ever `pre_norm` (CLIP): fusion and decoder are BERT's whatever it is.
    """
    return block_class(Block, compute.remat)(
        config.num_heads,
        config.mlp_dim,
        pre_norm=pre_norm,
        eps=config.layout.eps,
        activation=config.layout.activation,
        dropout=config.dropout,
        deterministic=deterministic,
        kernel_init=bert_init(config.width),
        compute=compute,
        name=name,
    )
