"""A vision transformer out of an ONNX file, under the names of transformers' `Dinov2Model`.

PyTorch's exporter keeps the name of a parameter that a node takes as it is. What it transposes or
cuts beforehand, the weights of linear layers and the table of positions, it stores under a made-up
name like `onnx::MatMul_1966`. The node that takes such a tensor still says what it is:
`/backbone/encoder/layer.0/mlp/fc1/MatMul`. The file is read, never run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped

if TYPE_CHECKING:
    import onnx

ROOT = "backbone"  # the module that is the vision transformer, in names of tensors and nodes
POSITIONS = "embeddings.position_embeddings"
CLASS_POSITION = f"{POSITIONS}[class]"  # the exporter cuts the table in two
GRID_POSITIONS = f"{POSITIONS}[grid]"


class GraphError(ValueError):
    """An ONNX file that does not hold what is looked for; the message names the tensor."""


@dataclass(frozen=True)
class VitSizes:
    """The sizes that all tensors follow from; the defaults are those of ViT-S/14 (DINOv2)."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 14
    image_size: int = 518  # of the table of positions; other sizes are interpolated
    mlp_ratio: int = 4


class VitTensors(NamedTuple):
    """Result of `convert`."""

    tensors: dict[str, Float32[np.ndarray, "..."]]  # by the names of `Dinov2Model`, as in its files
    left_out: tuple[str, ...]  # names of the file's tensors outside the vision transformer


def dinov2_config(sizes: VitSizes) -> dict[str, object]:
    """Return the `config.json` of a `Dinov2Model` of these sizes (ours).

    The mask token, which only DINOv2's own training uses, is no part of an exported model.
    """
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "mlp_ratio": sizes.mlp_ratio,
        "patch_size": sizes.patch,
        "image_size": sizes.image_size,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "qkv_bias": True,
        "use_mask_token": False,
        "use_swiglu_ffn": False,
    }


def dinov2_shapes(sizes: VitSizes) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a `Dinov2Model` (Hugging Face's layout)."""
    width = sizes.width
    positions = (sizes.image_size // sizes.patch) ** 2 + 1  # one for the class token
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        POSITIONS: (1, positions, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, sizes.patch, sizes.patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    for layer in range(sizes.depth):
        block = _block_shapes(width, width * sizes.mlp_ratio)
        shapes |= {f"encoder.layer.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def _block_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one block; linear weights are [out, in], as PyTorch's."""
    linear = {
        "attention.attention.query": (width, width),
        "attention.attention.key": (width, width),
        "attention.attention.value": (width, width),
        "attention.output.dense": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
    shapes: dict[str, tuple[int, ...]] = {name: (width,) for name in vectors}
    shapes |= {f"layer_scale{part}.lambda1": (width,) for part in (1, 2)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def read_model(content: bytes) -> "onnx.ModelProto":
    """Parse an ONNX file; needs the package `onnx`, which is imported here only (ours).

    Raises:
        GraphError: the bytes are no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_model_from_string(content)
    except DecodeError as error:
        raise GraphError(f"no ONNX file: {error}") from error


def convert(model: "onnx.ModelProto", sizes: VitSizes) -> VitTensors:
    """Extract the vision transformer of `model`, complete and of the right shapes (ours).

    Args:
        model: the graph; its vision transformer is a `Dinov2Model` in a module named `ROOT`.
        sizes: what its tensors must measure.

    Raises:
        GraphError: a tensor is missing, unknown, ambiguous, of another shape or not float32.
    """
    stored = {tensor.name: _to_array(tensor) for tensor in model.graph.initializer}
    tensors: dict[str, np.ndarray] = {}
    used = set()
    for name, source, transposed in _places(model.graph, stored):
        if name in tensors:
            raise GraphError(f"two tensors could be {name}, the second is {source}")
        tensors[name] = stored[source].T if transposed else stored[source]
        used.add(source)
    shapes = dinov2_shapes(sizes)
    one, count, width = shapes.pop(POSITIONS)  # in the file, the table is cut in two
    shapes |= {CLASS_POSITION: (one, 1, width), GRID_POSITIONS: (one, count - 1, width)}
    check_tensors(tensors, shapes)
    # Cut where the model takes [CLS] apart to interpolate the rest.
    positions = [tensors.pop(CLASS_POSITION), tensors.pop(GRID_POSITIONS)]
    tensors[POSITIONS] = np.concatenate(positions, axis=1)
    left_out = tuple(sorted(stored.keys() - used))
    return VitTensors({name: np.ascontiguousarray(tensors[name]) for name in tensors}, left_out)


def check_tensors(
    tensors: Mapping[str, Shaped[np.ndarray, "..."]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise GraphError unless `tensors` are exactly those of `shapes`, all float32 (ours)."""
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise GraphError(f"missing tensors: {_shortened(missing)}")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise GraphError(f"tensors without a place: {_shortened(unknown)}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise GraphError(f"{name} has shape {tensors[name].shape}, expected {shape}")
        if tensors[name].dtype != np.float32:
            raise GraphError(f"{name} is {tensors[name].dtype}, expected float32")


def _to_array(tensor: "onnx.TensorProto") -> Shaped[np.ndarray, "..."]:
    """Return the values of a stored tensor; those in files of their own are not followed."""
    from onnx import external_data_helper, numpy_helper

    if external_data_helper.uses_external_data(tensor):
        raise GraphError(f"{tensor.name} is stored outside the file")
    return numpy_helper.to_array(tensor)


def _places(
    graph: "onnx.GraphProto", stored: Mapping[str, object]
) -> Iterator[tuple[str, str, bool]]:
    """(name in a Dinov2Model, name in the file, whether transposed) of every tensor of the ViT."""
    kept = {source for source in stored if source.startswith(f"{ROOT}.")}
    for source in kept:
        yield source.removeprefix(f"{ROOT}."), source, False
    # The exporter transposes the weights of products and gives the results names of its own, so
    # these are found by the node that reads them.
    for node in graph.node:
        module = _module_of(node.name)
        for place, source in enumerate(node.input):
            if module is not None and source in stored and source not in kept:
                name = _name_by_use(module, node.op_type, place, source)
                yield name, source, node.op_type == "MatMul"  # which takes weights as [in, out]


def _name_by_use(module: str, operation: str, place: int, source: str) -> str:
    """Name a tensor without one, by the module, the operation and the input that takes it."""
    match module, operation, place:
        case _, "MatMul", 1:
            return f"{module}.weight"
        case "embeddings", "Concat", 0:
            return CLASS_POSITION
        case "embeddings", "Reshape", 0:
            return GRID_POSITIONS
    raise GraphError(f"{source}, input {place} of {operation} in {module}, is not known")


def _module_of(node_name: str) -> str | None:
    """Return dotted module of a node of the vision transformer, None for all others.

    >>> _module_of("/backbone/encoder/layer.0/mlp/fc1/MatMul")
    'encoder.layer.0.mlp.fc1'
    """
    prefix = f"/{ROOT}/"
    if not node_name.startswith(prefix):
        return None
    return ".".join(node_name.removeprefix(prefix).split("/")[:-1])


def _shortened(names: list[str], shown: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
