"""onnx_vit: every tensor gets its name and layout back; whatever is not as expected is named."""

import json

import numpy as np
import onnx_files
import pytest

from data_pipelines.offline.onnx_vit import (
    GraphError,
    VitSizes,
    convert,
    dinov2_config,
    dinov2_shapes,
    read_model,
)

SIZES = VitSizes(width=12, depth=2, heads=2, patch=2, image_size=6)
KEY = "encoder.layer.1.attention.attention.key.weight"


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0)
    shapes = dinov2_shapes(SIZES)
    return {name: noise.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def refused(model, sizes: VitSizes = SIZES) -> str:
    with pytest.raises(GraphError) as error:
        convert(model, sizes)
    assert "\n" not in str(error.value)
    return str(error.value)


def node_of(model, operation: str):
    return next(node for node in model.graph.node if node.op_type == operation)


def test_all_tensors_come_back_and_the_rest_is_listed(tensors):
    found = convert(onnx_files.exported(tensors), SIZES)
    assert found.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found.tensors[name], value, err_msg=name)
    assert found.left_out == ("decoder.final_conv.weight",)


def test_reading_back_the_bytes_of_a_file(tensors):
    model = read_model(onnx_files.exported(tensors).SerializeToString())
    np.testing.assert_array_equal(convert(model, SIZES).tensors[KEY], tensors[KEY])


def test_a_weight_that_kept_its_name_is_not_transposed(tensors):
    model = onnx_files.exported(tensors)  # say, of an exporter that writes Gemm(transB=1)
    [lost] = [node.input[1] for node in model.graph.node if node.name.endswith("1/mlp/fc1/MatMul")]
    [kept] = [tensor for tensor in model.graph.initializer if tensor.name == lost]
    name = "encoder.layer.1.mlp.fc1.weight"
    kept.name, kept.dims[:] = f"backbone.{name}", tensors[name].shape
    kept.raw_data = tensors[name].tobytes()
    np.testing.assert_array_equal(convert(model, SIZES).tensors[name], tensors[name])


def test_names_and_shapes_are_those_that_transformers_writes(tensors, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file, save_file
    from transformers import Dinov2Model

    (tmp_path / "config.json").write_text(json.dumps(dinov2_config(SIZES)))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, loading = Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    model.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: value.shape for name, value in written.items()} == dinov2_shapes(SIZES)
    assert model(torch.zeros(1, 3, 6, 4)).last_hidden_state.shape == (1, 1 + 3 * 2, 12)


def test_missing_tensors_are_named(tensors):
    del tensors["layernorm.bias"], tensors[KEY]
    message = refused(onnx_files.exported(tensors))
    assert message == f"missing tensors: {KEY}, layernorm.bias"


def test_many_missing_tensors_are_counted(tensors):
    message = refused(onnx_files.exported(tensors), VitSizes(12, 3, 2, 2, 6))
    assert message.startswith("missing tensors: encoder.layer.2.")
    assert message.endswith(" and 15 more")


def test_tensors_without_a_place_are_named(tensors):
    model = onnx_files.exported({**tensors, "embeddings.register_tokens": np.zeros((1, 4, 12))})
    assert refused(model) == "tensors without a place: embeddings.register_tokens"


def test_other_sizes_are_told_by_both_shapes(tensors):
    assert refused(onnx_files.exported(tensors), VitSizes(12, 2, 2, 2, 8)) == (
        "embeddings.position_embeddings[grid] has shape (1, 9, 12), expected (1, 16, 12)"
    )


def test_a_transposed_weight_is_an_unexpected_shape(tensors):
    name = "encoder.layer.0.mlp.fc2.weight"
    tensors[name] = tensors[name].T
    assert refused(onnx_files.exported(tensors)) == (
        f"{name} has shape (48, 12), expected (12, 48)"
    )


def test_half_precision_is_refused(tensors):
    tensors["layernorm.weight"] = tensors["layernorm.weight"].astype(np.float16)
    message = refused(onnx_files.exported(tensors))
    assert message == "layernorm.weight is float16, expected float32"


def test_two_tensors_for_one_name(tensors):
    model = onnx_files.exported(tensors)
    again = model.graph.node.add()
    again.CopyFrom(node_of(model, "MatMul"))
    again.input[1] = node_of(model, "Reshape").input[0]
    assert "two tensors could be encoder.layer.0.attention.attention.query.weight" in refused(model)


def test_an_unknown_use_of_a_nameless_tensor(tensors):
    model = onnx_files.exported(tensors)
    node_of(model, "Concat").op_type = "Mul"
    message = refused(model)
    assert "onnx::Concat_" in message and "input 0 of Mul in embeddings" in message


def test_tensors_in_files_of_their_own_are_not_followed(tensors):
    model = onnx_files.exported(tensors)
    tensor = model.graph.initializer[0]
    tensor.data_location = type(tensor).EXTERNAL
    assert refused(model) == f"{tensor.name} is stored outside the file"


def test_bytes_that_are_no_onnx_file():
    pytest.importorskip("onnx")
    with pytest.raises(GraphError, match="no ONNX file"):
        read_model(b"\x08\xff")
