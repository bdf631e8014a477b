"""Parameters under their PyTorch names, and back, equal bit for bit.

The parts of a path are joined by "." instead of "/". Kernels become weights and are transposed,
since torch stores them as (out, in); scales and embedding tables become weights as they are.
"""

import jax
import numpy as np
from jaxtyping import Float, PyTree

from data_pipelines.schema.checks import UserError
from vlmae.parallel.sharding import path_name

Tensors = dict[str, Float[np.ndarray, "..."]]

TABLES = ("word", "position", "token_type")  # modules whose one parameter is an embedding table
SAME_NAME = (  # and all below a `relative_bias`, which are named by their blocks
    "attention_scale",
    "bias",
    "cls",
    "embedding",
    "extra",
    "latents",
    "logit_bias",
    "mask_token",
    "mlp_scale",
    "positions",
    "temperature",
    "word_bias",
)


def to_torch(params: PyTree) -> Tensors:
    """Rename parameters to PyTorch's names, as contiguous float32 arrays.

    Raises: as `torch_views`.
    """
    # safetensors writes the bytes of another order as if they were contiguous.
    return {name: np.asarray(x, order="C") for name, x in torch_views(params).items()}


def torch_views(params: PyTree) -> Tensors:
    """Rename parameters to PyTorch's names; kernels are transposed views, nothing is copied.

    Raises:
      UserError: a parameter of an unknown kind, or one that is not float32; names it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = [_to_torch(path_name(path), np.asarray(leaf)) for path, leaf in leaves]
    # Sorted, so that two exports of a run are the same bytes.
    return dict(sorted(named))


def from_torch(tensors: Tensors) -> PyTree:
    """Invert `to_torch`: a tree of parameters, contiguous.

    Raises:
      UserError: a tensor of an unknown kind, or one that is not float32; names it.
    """
    params: PyTree = {}
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        leaf, value = _from_torch(name, tensor)
        node[leaf] = value
    return params


def _to_torch(path: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    _check_type(path, x)  # a conversion would lose the equality of bits
    *parents, leaf = path.split("/")
    # Temporal embeddings are called so too, but are a bare parameter in PyTorch.
    table = leaf == "embedding" and parents and parents[-1] in TABLES
    if leaf == "kernel" and x.ndim == 2:  # no kernel here is a convolution
        leaf, x = "weight", x.T
    elif (leaf == "scale" and x.ndim == 1) or table:
        leaf = "weight"
    elif not _keeps_name(parents, leaf):
        raise UserError(f"parameter {path} of shape {x.shape} has no name in PyTorch")
    return ".".join([*parents, leaf]), x


def _from_torch(name: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    _check_type(name, x)
    *parents, leaf = name.split(".")
    if leaf != "weight":
        if not _keeps_name(parents, leaf):
            raise UserError(f"tensor {name} of shape {x.shape} is no parameter of vlmae")
        return leaf, x
    # Only the rank tells a norm's weight from a linear layer's, and the parent a table's.
    if x.ndim == 1:
        return "scale", x
    if parents and parents[-1] in TABLES:
        return "embedding", x
    return "kernel", np.asarray(x.T, order="C")


def _keeps_name(parents: list[str], leaf: str) -> bool:
    return leaf in SAME_NAME or parents[-1:] == ["relative_bias"]


def _check_type(name: str, x: np.ndarray) -> None:
    if x.dtype != np.float32:
        raise UserError(f"{name} is {x.dtype}, but parameters are float32")
