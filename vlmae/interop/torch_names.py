"""Parameters under the names they have in PyTorch, and back: pure functions, equal bit for bit.

A path keeps its parts, joined by "." instead of "/". Kernels become weights and are transposed,
since torch stores them as (out, in); scales and embedding tables become weights as they are.
"""

import jax
import numpy as np
from jaxtyping import Float, PyTree

from vlmae.sharding import path_name

Tensors = dict[str, Float[np.ndarray, "..."]]

TABLES = ("word", "position", "token_type")  # modules whose one parameter is an embedding table
SAME_NAME = (  # and all below a `relative_bias`, which are named by their blocks
    "attention_scale",
    "bias",
    "cls",
    "embedding",
    "extra",
    "latents",
    "mask_token",
    "mlp_scale",
    "positions",
    "temperature",
    "word_bias",
)


def to_torch(params: PyTree) -> Tensors:
    """Contiguous float32 arrays by their names in PyTorch.

    Raises:
      ValueError: a parameter of an unknown kind, or one that is not float32; names it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = [_to_torch(path_name(path), np.asarray(leaf)) for path, leaf in leaves]
    return dict(sorted(named))


def from_torch(tensors: Tensors) -> PyTree:
    """The tree of parameters whose `to_torch` gives these tensors.

    Raises:
      ValueError: a tensor of an unknown kind, or one that is not float32; names it.
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
    _check_type(path, x)
    *parents, leaf = path.split("/")
    table = leaf == "embedding" and parents and parents[-1] in TABLES
    if leaf == "kernel" and x.ndim == 2:
        leaf, x = "weight", x.T
    elif (leaf == "scale" and x.ndim == 1) or table:
        leaf = "weight"
    elif not _keeps_name(parents, leaf):
        raise ValueError(f"parameter {path} of shape {x.shape} has no name in PyTorch")
    return ".".join([*parents, leaf]), np.asarray(x, order="C")


def _from_torch(name: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    _check_type(name, x)
    *parents, leaf = name.split(".")
    if leaf != "weight":
        if not _keeps_name(parents, leaf):
            raise ValueError(f"tensor {name} of shape {x.shape} is no parameter of vlmae")
        return leaf, x
    if x.ndim == 1:
        return "scale", x
    if parents and parents[-1] in TABLES:
        return "embedding", x
    return "kernel", np.asarray(x.T, order="C")


def _keeps_name(parents: list[str], leaf: str) -> bool:
    return leaf in SAME_NAME or parents[-1:] == ["relative_bias"]


def _check_type(name: str, x: np.ndarray) -> None:
    if x.dtype != np.float32:
        raise ValueError(f"{name} is {x.dtype}, but parameters are float32")
