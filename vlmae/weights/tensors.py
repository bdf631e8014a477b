"""Conversion of published tensors to parameters and back, by the rules of a family."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from data_pipelines.schema.checks import UserError
from vlmae.config.model import ModelConfig
from vlmae.models.embeddings import sincos_positions
from vlmae.weights.families import Family, Rule

Tensors = dict[str, np.ndarray]


class Kind(NamedTuple):
    """Conversion of a tensor to a parameter, and of a parameter to a tensor."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray, ModelConfig], np.ndarray]


def _read_patches(x: np.ndarray) -> np.ndarray:
    """Flatten a convolution over patches to a matrix from pixels ordered (frame, y, x, rgb)."""
    return rearrange(x if x.ndim == 5 else x[:, :, None], "d c f p q -> (f p q c) d")


def _write_patches(x: np.ndarray, model: ModelConfig) -> np.ndarray:
    patch = model.video.patch_size
    return rearrange(x, "(f p q c) d -> d c f p q", c=3, p=patch, q=patch)


KINDS = {
    "same": Kind(lambda x: x, lambda x, _: x),
    "transpose": Kind(np.transpose, lambda x, _: np.transpose(x)),
    "row": Kind(lambda x: x[0, 0], lambda x, _: x[None, None]),
    "rows": Kind(lambda x: x[0], lambda x, _: x[None]),
    "conv": Kind(_read_patches, lambda x, model: _write_patches(x, model)[:, :, 0]),
    "conv3d": Kind(_read_patches, _write_patches),
    # CLIP multiplies similarities by exp(x), we divide them by a temperature.
    "inverse_log": Kind(lambda x: np.exp(-x), lambda x, _: -np.log(x)),
}


class Read(NamedTuple):
    """Parameters read from the tensors of a file."""

    params: PyTree
    unused: list[str]  # names in the file for which there is no parameter


def read_tensors(tensors: Mapping[str, np.ndarray], family: Family, model: ModelConfig) -> Read:
    """Convert a family's tensors to parameters of encoder, fusion and pixel decoder.

    If two tensors are one parameter, as in files of a model with heads, the bare encoder's counts.

    Raises:
      UserError: positions that the family fixes differ from their formula; names the tensor.
    """
    found: Tensors = {}
    unused = []
    # Names with the prefix come first, so that the bare encoder wins over a second copy.
    for name in sorted(tensors, key=lambda name: not name.startswith(family.prefix)):
        bare = name.removeprefix(family.prefix)
        # Files of the first BERTs name the parameters of their norms as TensorFlow does.
        bare = re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", bare))
        rule, path = _parameter(bare, family, model)
        # Fixed positions are computed, not stored, in our model: they only have to be equal.
        # Checked, not ignored: weights trained with another table would load and be wrong.
        if rule is not None and rule.kind == "fixed":
            check_fixed(name, tensors[name])
        elif rule is None or path is None or path in found:
            unused.append(name)
        else:
            found[path] = KINDS[rule.kind].read(tensors[name])
    found |= _zero_biases(family, found, model)
    return Read(unflatten_dict(found, sep="/"), sorted(unused))


def write_tensors(params: PyTree, family: Family, model: ModelConfig) -> Tensors:
    """Convert parameters to a family's tensors, float32 and contiguous; other parts are left out.

    Raises:
      UserError: a parameter that the family lacks is not zero, so it cannot be left out.
    """
    tensors: Tensors = {}
    # Their blocks have the same names in {block} as those of this part.
    others = ("text_", "fusion") if family.part == "video" else ("video_",)
    for path, x in flatten_dict(params, sep="/").items():
        if path.startswith(others):
            continue
        layered, i = to_block(path, model)
        # Absent parameters are read as zero, so they can be left out only if they are.
        if layered in family.absent:
            # A key bias adds the same to all logits of a query, which the softmax removes.
            if not layered.endswith("attention/key/bias") and np.any(x):
                raise UserError(f"{path} is not zero, and {family.model_class} has none")
            continue
        for rule in family.rules:
            layer = _layer(rule.ours, layered, i)
            written = not rule.only or rule.only == model.video.layout.frame_cls
            if layer is not None and written:
                name = rule.theirs.split("|")[0].replace("{i}", layer)
                value = KINDS[rule.kind].write(np.asarray(x), model)
                tensors[name] = np.asarray(value, np.float32, order="C")
                break
    return tensors


def to_block(path: str, model: ModelConfig) -> tuple[str, str]:
    """Replace the block in a parameter's path by {block}; return the block's number beside it.

    The layers of a BERT are numbered through text encoder and fusion, which continues it.
    """
    found = re.match(r"(video_encoder|text_encoder|fusion)/block_(\d+)/(.*)", path)
    if not found:
        return path, ""
    number = int(found[2]) + (model.text.depth if found[1] == "fusion" else 0)
    return f"{{block}}/{found[3]}", str(number)


def from_block(path: str, i: int, part: str, model: ModelConfig) -> str | None:
    """Invert `to_block`; None for a layer that the model does not have."""
    if part == "video":
        return (
            path.replace("{block}", f"video_encoder/block_{i}") if i < model.video.depth else None
        )
    if i < model.text.depth:
        return path.replace("{block}", f"text_encoder/block_{i}")
    fused = i - model.text.depth
    # Only the layers of a BERT go on in a fusion, and only in one of BERT layers.
    is_bert = model.fusion.kind != "multiway" and not model.text.layout.pre_norm
    if not is_bert or fused >= model.fusion.depth:
        return None
    return path.replace("{block}", f"fusion/block_{fused}")


def check_fixed(name: str, table: np.ndarray) -> None:
    """Raise UserError if MAE's positions, [CLS] first, are not the 2-D sine-cosine ones."""
    side = round((table.shape[1] - 1) ** 0.5)
    expected = np.pad(sincos_positions(side, side, table.shape[2]), ((1, 0), (0, 0)))
    if table.shape[1] != side**2 + 1 or np.abs(table[0] - expected).max() > 1e-4:
        raise UserError(
            f"{name} is not the 2-D sine-cosine table of MAE: use model.video.positions=learned "
            "and a config.json with model_type vit"
        )


def _parameter(
    name: str, family: Family, model: ModelConfig
) -> tuple[Rule, str | None] | tuple[None, None]:
    """Find the rule for a tensor and the path of its parameter; None where the model lacks it."""
    for rule in family.rules:
        for theirs in rule.theirs.split("|"):
            found = re.fullmatch(re.escape(theirs).replace(r"\{i\}", r"(\d+)"), name)
            if not found:
                continue
            if "{block}" in rule.ours:
                return rule, from_block(rule.ours, int(found[1]), family.part, model)
            return rule, rule.ours.replace("{i}", found[1] if found.groups() else "")
    return None, None


def _layer(ours: str, path: str, i: str) -> str | None:
    """Return the layer's number if the path fits the pattern ("" without one), else None."""
    found = re.fullmatch(re.escape(ours).replace(r"\{i\}", r"(\d+)"), path)
    if not found:
        return None
    return found[1] if found.groups() else i


def _zero_biases(family: Family, found: Tensors, model: ModelConfig) -> Tensors:
    """Make zeros for the biases that the family lacks, beside each of their kernels."""
    kernels = {path.removesuffix("bias") + "kernel" for path in family.absent}
    return {
        path.removesuffix("kernel") + "bias": np.zeros(x.shape[-1], np.float32)
        for path, x in found.items()
        if to_block(path, model)[0] in kernels
    }
