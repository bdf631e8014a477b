"""Folders of published weights: what is read, resized, refused, and said about it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import SMALL, init_params, random_batch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from torch_weights import randomize, set_sincos_positions

from data_pipelines.schema.checks import UserError
from vlmae.config.experiment import ExperimentConfig, InitConfig
from vlmae.config.model import (
    ModelConfig,
    PixelDecoderConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
    VitLayout,
)
from vlmae.config.tree import override
from vlmae.models.video_language import build_model
from vlmae.training.init_weights import fit_positions, read_initial, take_initial
from vlmae.weights.command import as_python
from vlmae.weights.families import FAMILIES
from vlmae.weights.huggingface import load_published, merge_trees, open_published, read_folder
from vlmae.weights.tensors import read_tensors, write_tensors

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
    "image_size": 20,
}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> tuple[transformers.ViTModel, Path]:
    folder = tmp_path_factory.mktemp("vit")
    model = transformers.ViTModel(transformers.ViTConfig(**VIT)).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def copied(vit, tmp_path) -> Path:
    """A copy of the folder, to be damaged."""
    for path in vit[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def config_of(folder: Path) -> ExperimentConfig:
    video = VideoEncoderConfig(**open_published(str(folder)).fields)
    model = dataclasses.replace(SMALL.model, video=video)
    config = override(dataclasses.replace(SMALL, model=model), {"objectives.mvm": 0.0})
    init = InitConfig(video=str(folder))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, init=init))


def test_a_run_starts_from_published_weights(vit):
    """One block fewer, another grid: what is left out and resized is named."""
    config = override(config_of(vit[1]), {"model.video.depth": 1})
    params = init_params(build_model(config), random_batch(), config.objectives)
    merged, report = take_initial(read_initial(config), params)
    assert f"from video of {vit[1]}: loaded 21 parameters" in report
    assert "resized: video_encoder/positions: (26, 16) in the source, (17, 16)" in report
    assert f"unused: encoder.layer.1.output.dense.bias of {vit[1]}" in report
    number = len(jax.tree.leaves(params["text_encoder"]))
    assert f"missing: text_encoder ({number} parameters)" in report
    kernel = merged["video_encoder"]["block_0"]["mlp"]["up"]["kernel"]
    given = load_file(vit[1] / WEIGHTS)["encoder.layer.0.intermediate.dense.weight"]
    np.testing.assert_array_equal(kernel, given.T)
    unchanged = [merged["text_encoder"], params["text_encoder"]]
    jax.tree.map(np.testing.assert_array_equal, *unchanged)


@pytest.mark.parametrize("grid", [3, 8])
def test_another_grid_sees_what_pytorch_sees(vit, grid):
    model, folder = vit
    table = read_folder(folder)["embeddings.position_embeddings"]
    pixels = torch.zeros(1, 3, 4 * grid, 4 * grid)
    with torch.no_grad():
        expected = model.embeddings.interpolate_pos_encoding(
            torch.zeros(1, grid**2 + 1, 16), 4 * grid, 4 * grid
        )
    assert pixels.shape[-1] != VIT["image_size"]
    initial = np.zeros((grid**2 + 1, 16), np.float32)
    fitted = fit_positions("video_encoder/positions", table[0], initial)
    np.testing.assert_allclose(fitted, expected[0], atol=1e-5)


def test_relative_biases_of_another_grid():
    """Between the same offsets the table keeps its values; [CLS] keeps its own."""
    table = np.arange(9 * 9 + 3, dtype=np.float32)[:, None].repeat(2, axis=1)
    same = fit_positions("video_encoder/relative_bias/shared", table, table)
    np.testing.assert_allclose(same, table, atol=1e-5)
    larger = fit_positions("video_encoder/relative_bias/block_0", table, np.zeros((17**2 + 3, 2)))
    np.testing.assert_array_equal(larger[-3:], table[-3:])
    np.testing.assert_allclose(larger[17 * 8 + 8], table[9 * 4 + 4], atol=1e-4)  # no offset


def test_vit_mae_brings_its_decoder(tmp_path):
    """The outputs are compared in test_parity_video; here every tensor finds its place."""
    config = transformers.ViTMAEConfig(
        **VIT,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    mae = transformers.ViTMAEForPreTraining(config)
    set_sincos_positions(mae)
    mae.save_pretrained(tmp_path)
    video = VideoEncoderConfig(**open_published(str(tmp_path)).fields)
    model = ModelConfig(video=video, pixel_decoder=PixelDecoderConfig(8, 2, 2), dtype="float32")
    read = load_published(str(tmp_path), "video", model)
    assert not read.unused
    assert read.params["pixel_decoder"]["mask_token"].shape == (8,)
    experiment = dataclasses.replace(
        SMALL, data=dataclasses.replace(SMALL.data, image_size=20), model=model
    )
    assert set(read.params["pixel_decoder"]) == {
        "embed",
        "block_0",
        "block_1",
        "norm",
        "pixels",
        "mask_token",
    }
    assert build_model(experiment).grid == (5, 5)


def test_foreign_fixed_positions_are_refused(tmp_path):
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**VIT))
    randomize(model)
    model.embeddings.position_embeddings.data[0, 3] += 0.5
    model.save_pretrained(tmp_path)
    model = ModelConfig(video=VideoEncoderConfig(**open_published(str(tmp_path)).fields))
    with pytest.raises(ValueError, match=r"embeddings.position_embeddings is not the 2-D sine"):
        load_published(str(tmp_path), "video", model)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"vit_mae", "videomae"}))
def test_our_parameters_come_back_bit_for_bit(name):
    """Ours to theirs to ours: nothing is rounded, moved or lost."""
    hf = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    hf |= {"intermediate_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "vocab_size": 9}
    hf |= {"mlp_ratio": 2, "layerscale_value": 0.5, "layer_scale_init_value": 0.1}
    family = FAMILIES[name]
    fields = family.fields(hf | {"use_relative_position_bias": True})
    if family.part == "video":
        model = ModelConfig(video=VideoEncoderConfig(**fields), dtype="float32")
    else:
        text = TextEncoderConfig(**fields | {"max_len": 12})
        model = ModelConfig(VideoEncoderConfig(patch_size=4), text, dtype="float32")
    experiment = dataclasses.replace(
        override(SMALL, {"objectives.mlm": 0.0}),  # not with a causal text encoder
        model=model,
        data=dataclasses.replace(SMALL.data, image_size=12),
    )
    module = build_model(experiment)
    inputs = {
        "video": (jnp.zeros((1, 1, 12, 12, 3), "uint8"),),
        "text": (jnp.zeros((1, 5), "int32"), jnp.ones((1, 5), bool)),
    }[family.part]
    method = {"video": module.encode_video, "text": module.encode_text}[family.part]
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, method=method))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("float32"), shapes["params"])
    for path in family.absent:  # what the family lacks is zero, or changes nothing
        for i in range(model.video.depth) if "{block}" in path else [""]:
            *above, leaf = path.replace("{block}", f"video_encoder/block_{i}").split("/")
            if above[0] not in params:
                continue
            branch = params
            for key in above:
                branch = branch[key]
            branch[leaf] = np.zeros_like(branch[leaf])
    read = read_tensors(write_tensors(params, family, model), family, model)
    assert not read.unused
    jax.tree.map(np.testing.assert_array_equal, read.params, params)


def test_what_a_family_lacks_must_be_zero():
    params = {"video_encoder": {"patch_embed": {"bias": np.ones(4, np.float32)}}}
    with pytest.raises(ValueError, match="patch_embed/bias is not zero, and CLIPVisionModel has"):
        write_tensors(params, FAMILIES["clip_vision_model"], ModelConfig())


# --- bad input: one clear line each


def test_another_config_is_refused_field_by_field(vit):
    layout = VitLayout(layer_scale=1.0, eps=1e-6)
    video = VideoEncoderConfig(16, 3, 2, 64, 4, positions="learned", layout=layout)
    with pytest.raises(ValueError) as error:
        load_published(str(vit[1]), "video", ModelConfig(video=video))
    lines = str(error.value).splitlines()
    assert lines[0] == f"the config does not fit {vit[1]}:"
    assert "  model.video.depth is 3, at most 2" in lines
    assert "  model.video.mlp_dim is 64, must be 32" in lines
    assert "  model.video.layout.layer_scale is 1.0, must be 0.0" in lines
    assert "  model.video.layout.eps is 1e-06, must be 1e-12" in lines
    with pytest.raises(ValueError, match="is no text encoder but vit"):
        load_published(str(vit[1]), "text", ModelConfig())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "swin"}, "config.json: model_type 'swin' is none of beit, bert"),
        ({"hidden_act": "relu"}, "config.json: hidden_act 'relu' is none of gelu, quick_gelu"),
        ({"use_swiglu_ffn": True}, "config.json: use_swiglu_ffn: SwiGLU layers are not supported"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type 'rotary' is not supp"),
    ],
)
def test_unknown_architectures_are_refused(copied, changes, said):
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=said):
        open_published(str(copied))


def test_damaged_and_missing_files_are_named(copied):
    whole = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged: "):
        read_folder(copied)
    (copied / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"no {WEIGHTS}$"):
        read_folder(copied)
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin, and pickle files are never"):
        read_folder(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        open_published(str(copied))
    with pytest.raises(ValueError, match="no such folder"):
        open_published(str(copied / "elsewhere" / "deeper"))


def test_a_tensor_of_another_shape_is_refused(copied):
    config = override(config_of(copied), {"model.video.depth": 1})
    params = init_params(build_model(config), random_batch(), config.objectives)
    tensors = load_file(copied / WEIGHTS)
    tensors["layernorm.bias"] = np.zeros(5, np.float32)
    del tensors["layernorm.weight"]
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"video_encoder/norm/bias: \(5,\) in the source, \(16,\)"):
        take_initial(read_initial(config), params)


# --- what may differ between files


def test_what_was_not_asked_for_may_not_fit(tmp_path):
    """MAE's folder has a decoder, too; ours is smaller, and keeps its initial values."""
    hf = transformers.ViTMAEConfig(
        **VIT, decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=2
    )
    mae = transformers.ViTMAEForPreTraining(hf)
    set_sincos_positions(mae)
    mae.save_pretrained(tmp_path)
    config = override(config_of(tmp_path), {"objectives.mvm": 1.0})
    params = init_params(build_model(config), random_batch(), config.objectives)
    merged, report = take_initial(read_initial(config), params)
    left_out = [line for line in report.splitlines() if "left out" in line]
    assert len(left_out) == 1 and "more of pixel_decoder" in left_out[0]
    kept = jax.tree.map(np.array_equal, merged["pixel_decoder"], params["pixel_decoder"])
    assert all(jax.tree.leaves(kept))
    assert not np.array_equal(
        *(x["video_encoder"]["patch_embed"]["kernel"] for x in (merged, params))
    )


def test_half_precision_and_shards_are_read(vit, tmp_path):
    tensors = {name: torch.from_numpy(x) for name, x in read_folder(vit[1]).items()}
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, chosen in parts.items():
        save_torch({name: tensors[name].bfloat16() for name in chosen}, tmp_path / file)
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read = read_folder(tmp_path)
    assert read.keys() == tensors.keys()
    for name, x in read.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, tensors[name].bfloat16().float().numpy())


def test_the_processor_says_how_pixels_are_normalized(copied):
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (copied / "preprocessor_config.json").write_text(json.dumps(processor))
    layout = open_published(str(copied)).fields["layout"]
    assert layout.pixel_mean == (0.1, 0.2, 0.3) and layout.pixel_std == (0.4, 0.5, 0.6)


def test_printed_fields_make_the_config(vit):
    published = open_published(str(vit[1]))
    namespace = {"VideoEncoderConfig": VideoEncoderConfig, "VitLayout": VitLayout}
    printed = as_python(published)
    assert printed.startswith("video=VideoEncoderConfig(width=16, depth=2")
    made = eval(printed.removeprefix("video="), namespace)
    assert made == VideoEncoderConfig(**published.fields)


def test_trees_are_merged_branch_by_branch():
    left, right = {"a": {"b": 1}, "c": 2}, {"a": {"d": 3}}
    assert merge_trees([left, right]) == {"a": {"b": 1, "d": 3}, "c": 2}


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, name):
    (tmp_path / "a").mkdir()
    save_torch({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"x": name}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: .* is no file name"):
        read_folder(tmp_path / "a")
