"""Small ONNX graphs that hold a vision transformer as PyTorch's exporter writes it."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.offline.fetch import ARCHIVES
from data_pipelines.offline.weights import VIT_FILE

POSITIONS = "embeddings.position_embeddings"


def exported(tensors: dict[str, np.ndarray]):
    """A model whose parts named `backbone` hold `tensors` (names of transformers' Dinov2Model).

    Linear weights are transposed, the positions are cut in two, and both lose their names; a
    decoder comes after. The nodes are only those that take a tensor: nothing here can be run.
    """
    onnx = pytest.importorskip("onnx")
    stored = {"decoder.final_conv.weight": np.ones((1, 12, 1, 1), np.float32)}
    takes = [("Conv", "/decoder/final_conv/Conv", ["x", "decoder.final_conv.weight"])]
    for number, (name, value) in enumerate(tensors.items()):
        module, _, last = name.rpartition(".")
        path = f"/backbone/{module.replace('.', '/').replace('layer/', 'layer.')}"
        if name == POSITIONS:
            row, grid = f"onnx::Concat_{number}", f"onnx::Reshape_{number}"
            stored |= {row: value[:, :1], grid: value[:, 1:]}
            takes.append(("Reshape", f"{path}/Reshape_1", [grid, "shape"]))
            takes.append(("Concat", f"{path}/Concat_6", [row, "resized"]))
        elif last == "weight" and value.ndim == 2:
            stored[f"onnx::MatMul_{number}"] = value.T
            takes.append(("MatMul", f"{path}/MatMul", ["x", f"onnx::MatMul_{number}"]))
        else:
            stored[f"backbone.{name}"] = value
            takes.append(("Add", f"{path}/Add", ["x", f"backbone.{name}"]))
    nodes = [onnx.helper.make_node(op, inputs, [f"{name}_out"], name) for op, name, inputs in takes]
    values = [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "main", [], [], values))


FEATURES = "/backbone/layernorm/Add_1_output_0"  # inside the real file, before its decoder


def real_features(downloads: Path, images: np.ndarray) -> np.ndarray:
    """What the ViT inside the real package makes of normalized images [b 3 224 224]."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime", reason="to run the file itself")
    with zipfile.ZipFile(downloads / ARCHIVES["vit_s14"][0].filename) as wheel:
        graph = onnx.load_model_from_string(wheel.read(VIT_FILE))
    graph.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, 1, None))
    session = runtime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run([FEATURES], {"input_image": images})[0]
