"""Operations of the matrix products of a layer: two for each multiplication with its addition.

A product of activations with parameters is taken once more for the gradient of its parameters and
once more for that of its inputs; a product of two activations once more for each of the two. All
is counted for one row of a batch; formulas are ours.
"""

from typing import NamedTuple

from vlmae.model_config import Remat


class Operations(NamedTuple):
    """What products cost. `+` adds them part by part, `times` repeats them."""

    forward: int = 0
    backward: int = 0
    again: int = 0  # forward once more, for the backward pass: what was not kept

    @property
    def total(self) -> int:
        """All operations of a training step."""
        return self.forward + self.backward + self.again

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> "Operations":
        """The same `count` times."""
        return Operations(*(count * part for part in self))

    def computed_again(self, operations: int) -> "Operations":
        """With so many operations once more for the backward pass, if there is any."""
        return self._replace(again=self.again + bool(self.backward) * operations)


def added(*parts: Operations) -> Operations:
    """The sum of parts."""
    return sum(parts, Operations())


def dense(
    tokens: int, fan_in: int, fan_out: int, *, learned: bool = True, upstream: bool = True
) -> Operations:
    """A dense layer; `learned` and `upstream`: parameters and inputs take gradients."""
    forward = 2 * tokens * fan_in * fan_out
    return Operations(forward, forward * (learned + upstream))


def pairs(rows: int, columns: int, width: int, *, gradients: int = 2) -> Operations:
    """A product of activations, [rows width] with [width columns] in any order.

    `gradients` says how many of the two factors take one.
    """
    forward = 2 * rows * columns * width
    return Operations(forward, forward * gradients)


def attention(
    queries: int,
    keys: int,
    width: int,
    key_width: int,
    *,
    learned: bool = True,
    upstream: bool = True,
) -> Operations:
    """Four projections, logits and the values weighted by them; the number of heads is nothing."""
    flows = learned or upstream
    return added(
        dense(queries, width, width, learned=learned, upstream=upstream),
        dense(keys, key_width, width, learned=learned, upstream=upstream).times(2),
        pairs(queries, keys, width, gradients=2 * flows).times(2),
        dense(queries, width, width, learned=learned, upstream=flows),
    )


class Layer(NamedTuple):
    """The sizes of a transformer block."""

    width: int
    hidden: int  # of the feed-forward network
    pre_norm: bool  # a ViT's; else a BERT's
    remat: Remat = "none"


def feed_forward(
    layer: Layer, tokens: int, *, learned: bool = True, upstream: bool = True
) -> Operations:
    """Two dense layers."""
    flows = learned or upstream
    up = dense(tokens, layer.width, layer.hidden, learned=learned, upstream=upstream)
    return up + dense(tokens, layer.hidden, layer.width, learned=learned, upstream=flows)


class Context(NamedTuple):
    """What cross-attention reads."""

    tokens: int
    width: int


def block(
    layer: Layer,
    tokens: int,
    *,
    source: int = 0,
    context: Context | None = None,
    survivors: int | None = None,
    learned: bool = True,
    upstream: bool = True,
) -> Operations:
    """A transformer block.

    Args:
      layer: its sizes.
      tokens: those that enter it.
      source: further tokens that self-attention reads (multiway fusion).
      context: what cross-attention reads; None: there is none.
      survivors: tokens that reach the feed-forward network; None: all.
      learned: its parameters take gradients.
      upstream: its input takes gradients.
    """
    flows = learned or upstream
    # A learned norm before the products needs the gradient of their inputs itself.
    inputs = flows if layer.pre_norm else upstream
    reached = tokens if survivors is None else survivors
    total = attention(
        tokens, tokens + source, layer.width, layer.width, learned=learned, upstream=inputs
    )
    if context is not None:
        total += attention(tokens, context.tokens, layer.width, context.width, learned=learned)
    total += feed_forward(layer, reached, learned=learned, upstream=flows)
    if layer.remat == "selective":
        # Logits, and what the gradient of learned output projections needs: the weighted values.
        again = pairs(tokens, tokens + source, layer.width).times(1 + learned)
        if context is not None:
            again += pairs(tokens, context.tokens, layer.width).times(1 + learned)
        return total.computed_again(again.forward)
    if layer.remat == "full":
        # What pre-norm blocks add last is no activation that a gradient needs.
        spared = dense(reached, layer.hidden, layer.width).forward if layer.pre_norm else 0
        return total.computed_again(total.forward - spared)
    return total
