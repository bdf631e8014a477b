"""Building blocks of all modules: dense layers, norms, initializers, noise, and how to compute."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vlmae.config.model import Remat

# Between two widths (heads, scorers): 0.02 from an input as wide as BERT, more from a narrower one.
BERT_INIT = nn.initializers.variance_scaling(0.02**2 * 768, "fan_in", "normal")
TOKEN_INIT = nn.initializers.normal(0.02)  # single tokens and tables, whatever their width
VIT_INIT = nn.initializers.xavier_uniform()
DENSE_OUTPUT = "dense"  # name of what dense layers put out, for `blocks.REMATS`
BERT_EPS, VIT_EPS = 1e-12, 1e-6  # of the layer norms; ViT's as in MAE


@dataclass(frozen=True)
class Compute:
    """Number type, attention kernel and rematerialization, shared by the layers of a model.

    Attributes:
      dtype: type of the activations; parameters, softmax and losses are float32.
      attention: one of `attention.KERNELS`.
      remat: activations that the backward pass recomputes, one of `blocks.REMATS`.
      gradient_dtype: type in which devices sum the gradients of kernels and word tables; those of
        biases, norms and single tokens are float32.
    """

    dtype: str = "float32"
    attention: str = "xla"
    remat: Remat = "none"
    gradient_dtype: str = "float32"


@functools.cache  # equal blocks must have equal fields, to be traced once
def bert_init(width: int) -> nn.initializers.Initializer:
    """Make the initializer of all kernels in blocks of this width: N(0, 0.02) at BERT's 768.

    Narrower blocks get larger weights (ours). With 0.02 everywhere a model 96 wide starts with
    layers that hardly change their tokens, and does not learn to match. As in BERT it is one
    deviation for a block, whatever the inputs' width: for the second layer of the feed-forward
    network, and for cross-attention to tokens of another width.
    """
    return nn.initializers.normal(0.02 * math.sqrt(768 / width))


def dot_rows(x: Float[Array, "*b d"], kernel: Float[Array, "d e"]) -> Float[Array, "*b e"]:
    """Multiply tokens by a kernel.

    All tokens become the rows of one matrix: with two batch dimensions XLA transposes a copy of the
    incoming gradient for the gradient of the kernel.
    """
    # Free: tokens lie one after the other in memory, whatever the number of batch dimensions.
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())))
    return y.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(
    x: Float[Array, "*b d"], kernel: Float[Array, "d e"], bias: Float[Array, " e"], sums: str
) -> Float[Array, "*b e"]:
    """Multiply tokens by a float32 kernel and add a bias, in the type of the tokens.

    Differentiated as it stands, a bias would get a gradient that GPUs sum in the tokens' type, row
    by row. Here it is summed in float32, and that of the kernel leaves its product in the type
    `sums`, in which devices then sum it. (XLA's CPU backend widens such sums, so that only the
    program for a GPU shows the difference.)
    """
    del sums
    return dot_rows(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


def _affine_backward(
    sums: str, inputs: tuple[Array, Array, Array], grad: Array
) -> tuple[Array, Array, Array]:
    x, kernel, bias = inputs
    rows, grads = (y.reshape(-1, y.shape[-1]) for y in (x, grad))
    by_x = dot_rows(grad, kernel.astype(x.dtype).T)
    by_kernel = jax.lax.dot_general(
        rows, grads, (((0,), (0,)), ((), ())), preferred_element_type=sums
    )
    return by_x, by_kernel.astype(kernel.dtype), grads.astype(bias.dtype).sum(axis=0)


affine.defvjp(
    lambda x, kernel, bias, sums: (affine(x, kernel, bias, sums), (x, kernel, bias)),
    _affine_backward,
)


class Dense(nn.Module):
    """Dense layer, the only one of the models.

    Attributes:
      features: width of the output.
      compute: type of the activations, and of the sums of the kernel's gradient.
      kernel_init: initializer of the kernel.
    """

    features: int
    compute: Compute = Compute()
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, inputs: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        """Map every token alone."""
        x = inputs.astype(self.compute.dtype)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, bias = jnp.asarray(kernel), jnp.asarray(bias)  # loaded ones may be NumPy's
        if x.dtype == jnp.float32:  # nothing is rounded, so JAX's own gradient will do
            return dot_rows(x, kernel) + bias
        # Named, as `--model.remat selective` would not find the product inside.
        return checkpoint_name(affine(x, kernel, bias, self.compute.gradient_dtype), DENSE_OUTPUT)


@jax.custom_vjp
def dot_tables(x: Float[Array, "s *b d"], tables: Float[Array, "s v d"]) -> Float[Array, "s *b v"]:
    """Multiply tokens of each shard by its table to float32 logits: no sum is rounded.

    The backward pass multiplies in the tokens' type, as that of any dense layer, since products
    with float32 gradients would be slower. It sums in float32, as the gradient of looking words up
    in the same table does.
    """
    return jax.lax.dot_general(
        x,
        tables.astype(x.dtype),
        (((x.ndim - 1,), (2,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )


def _dot_tables_backward(inputs: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, tables = inputs
    grad = grad.astype(x.dtype)
    by_x = jax.lax.dot_general(
        grad, tables.astype(x.dtype), (((grad.ndim - 1,), (1,)), ((0,), (0,)))
    )
    rows, grads = (y.reshape(len(y), -1, y.shape[-1]) for y in (x, grad))
    by_tables = jax.lax.dot_general(
        grads, rows, (((1,), (1,)), ((0,), (0,))), preferred_element_type=tables.dtype
    )
    return by_x, by_tables


dot_tables.defvjp(lambda *inputs: (dot_tables(*inputs), inputs), _dot_tables_backward)


def to_width(embed: Dense, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    """Project tokens by `embed`; tokens that have its width already pass without parameters."""
    return x if x.shape[-1] == embed.features else embed(x)


def vit_norm(name: str, dtype: str) -> nn.LayerNorm:
    """Make a layer norm with MAE's epsilon, for every part of the model that is no BERT."""
    return nn.LayerNorm(epsilon=VIT_EPS, dtype=dtype, name=name)


def uniform_noise(module: nn.Module, shape: tuple[int, ...]) -> Float[Array, "b *n"]:
    """Draw noise in [0, 1) from the module's "noise" stream.

    Without such a stream (in evaluation) all rows get the same noise, that of key 0, so that no
    result depends on the position of a clip in its batch.
    """
    # Modules ask for a stream by name, so that dropout and noise do not shift each other's draws.
    if module.has_rng("noise"):
        return jax.random.uniform(module.make_rng("noise"), shape)
    return jnp.broadcast_to(jax.random.uniform(jax.random.key(0), shape[1:]), shape)
