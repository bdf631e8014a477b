"""Adapters: frozen shallow blocks, corrected by a little attention beside them (MuLTI, v1)."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from vlmae.model_config import AdapterConfig
from vlmae.models.layers import BERT_INIT, Attention, Dense, vit_norm


class Adapter(nn.Module):
    """Up(attention(Down(LN x))): what is added to frozen features; zero at the start.

    Attributes:
      config: width of the bottleneck and its heads.
      dtype, attention: see `Attention`.
    """

    config: AdapterConfig
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], lengths: Int[Array, " b"] | None = None
    ) -> Float[Array, "b l d"]:
        """The correction of `x`, whose first `lengths` tokens are valid."""
        y = vit_norm("norm", self.dtype)(x)
        down = Dense(self.config.width, dtype=self.dtype, kernel_init=BERT_INIT, name="down")
        attention = Attention(
            self.config.num_heads, BERT_INIT, self.dtype, self.attention, name="attention"
        )
        up = Dense(x.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.zeros, name="up")
        y = down(y)
        return up(attention(y, y, lengths).tokens)


class ShallowAdapters(nn.Module):
    """What happens after each block of an encoder whose first blocks are frozen.

    `side`: each frozen block has an adapter that reads its output and adds to a branch, which joins
    the stream after the last frozen block; so no gradient enters the frozen blocks, and their
    activations need not be kept. `inline`: the adapter corrects the stream at once, and gradients
    run through the later frozen blocks. `none`: the blocks are frozen without any adapter.

    Attributes: as `Adapter`.
    """

    config: AdapterConfig
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        block: int,
        x: Float[Array, "b l d"],
        branch: Float[Array, "b l d"] | None,
        lengths: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"] | None]:
        """The stream and the branch after a block.

        Args:
          block: its number, from 0.
          x: what it made.
          branch: the side branch so far; None before the first block.
          lengths: valid tokens of each row; None: all are.
        """
        config = self.config
        if block >= config.frozen_blocks:
            return x, branch
        if config.kind == "inline":
            return x + self._adapter(block)(x, lengths), None
        x = jax.lax.stop_gradient(x)
        if config.kind == "side":
            added = self._adapter(block)(x, lengths)
            branch = added if branch is None else branch + added
        is_last = block == config.frozen_blocks - 1
        return (x + branch if is_last and branch is not None else x), branch

    def _adapter(self, block: int) -> Adapter:
        return Adapter(self.config, self.dtype, self.attention, name=f"block_{block}")
