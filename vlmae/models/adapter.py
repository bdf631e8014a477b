"""Adapters: frozen shallow blocks, whose features small trained attentions correct (MuLTI, v1)."""

from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from vlmae.config.model import AdapterConfig
from vlmae.models.attention import Attention
from vlmae.models.layers import BERT_INIT, Compute, Dense, bert_init, vit_norm
from vlmae.ops.registry import Registry


class Adapter(nn.Module):
    """Correction of frozen features, Up(attention(Down(LN x))); zero at initialization.

    Attributes:
      config: width of the bottleneck and its heads.
    """

    config: AdapterConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], lengths: Int[Array, " b"] | None = None
    ) -> Float[Array, "b l d"]:
        """Compute the correction of `x`, whose first `lengths` tokens are valid."""
        config, compute = self.config, self.compute
        # A bottleneck for the attention too: its cost is that of the narrow width.
        down = Dense(config.width, compute=compute, kernel_init=BERT_INIT, name="down")
        attention = Attention(
            config.num_heads, bert_init(config.width), self.compute, name="attention"
        )
        # Zeros, so that training starts from the pretrained features.
        up = Dense(x.shape[-1], compute=compute, kernel_init=nn.initializers.zeros, name="up")
        # Pre-norm here even in BERT: with `up` at zero the branch must leave the stream as it is.
        y = down(vit_norm("norm", compute.dtype)(x))
        return up(attention(y, y, lengths).tokens)


# (output x of a frozen block, side branch so far, adapter) -> (x, side branch)
Stream = tuple[Array, Array | None]


def adapt_side(x: Array, branch: Array | None, adapter: Callable[[Array], Array]) -> Stream:
    """Add the correction to the branch; no gradient enters the frozen block.

    So none of its activations are kept for the backward pass, which is what saves the memory.
    """
    x = jax.lax.stop_gradient(x)
    added = adapter(x)
    return x, added if branch is None else branch + added


ADAPTERS: Registry[Callable[..., Stream]] = Registry(
    "adapter",
    {
        "none": lambda x, branch, _: (jax.lax.stop_gradient(x), branch),
        "side": adapt_side,
        # No gradient is cut: those of deeper adapters run through the frozen blocks above.
        "inline": lambda x, branch, adapter: (x + adapter(x), branch),
    },
)


class ShallowAdapters(nn.Module):
    """Adapters of an encoder's frozen first blocks; a side branch joins after the last of them.

    Attributes:
      config: kind of `ADAPTERS`, number of frozen blocks, sizes.
    """

    config: AdapterConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        block: int,
        x: Float[Array, "b l d"],
        branch: Float[Array, "b l d"] | None,
        lengths: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"] | None]:
        """Return stream and side branch after a block; those after a trained block are unchanged.

        Args:
          block: number of the block, from 0.
          x: output of the block.
          branch: the side branch so far; None before the first block and after the last frozen one,
            whose tokens later blocks may prune.
          lengths: valid tokens of each row; None: all are.
        """
        if block >= self.config.frozen_blocks:
            return x, branch

        def adapter(x: Array) -> Array:
            return Adapter(self.config, self.compute, name=f"block_{block}")(x, lengths)

        x, branch = ADAPTERS[self.config.kind](x, branch, adapter)
        if block < self.config.frozen_blocks - 1 or branch is None:
            return x, branch
        # Once, at the end: until there the frozen blocks see only frozen features.
        return x + branch, None
