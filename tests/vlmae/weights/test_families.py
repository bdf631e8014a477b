"""Every published family against its PyTorch class: features, in both directions, odd grids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch_weights import randomize

from vlmae.config.model import (
    FusionConfig,
    ModelConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
    VitLayout,
)
from vlmae.models.embeddings import normalize_pixels, patchify
from vlmae.models.layers import BERT_EPS, VIT_EPS
from vlmae.models.text_encoder import TextEncoder
from vlmae.models.video_encoder import VideoEncoder, VideoFeatures
from vlmae.ops.masking import mask_from_noise
from vlmae.weights.families import ACTIVATIONS, FAMILIES
from vlmae.weights.huggingface import load_published, open_published, read_folder
from vlmae.weights.tensors import write_tensors

TOLERANCE = 1e-5  # of the largest value
FRAMES = 4
SIZES = {  # width, depth, heads, hidden width, patch, grid
    "small": (24, 2, 3, 48, 4, 5),
    "odd": (40, 3, 5, 96, 6, 3),
}


class Case(NamedTuple):
    """A class of transformers: how it is made, and what of its output is ours."""

    model_class: type
    config_class: type
    options: dict
    unused: set[str] = frozenset()  # tensors that have no parameter


VIDEO_CASES = {
    "vit": Case(
        transformers.ViTModel,
        transformers.ViTConfig,
        {},
        {"pooler.dense.weight", "pooler.dense.bias"},
    ),
    "deit": Case(
        transformers.DeiTModel,
        transformers.DeiTConfig,
        {},
        {"pooler.dense.weight", "pooler.dense.bias"},
    ),
    "dinov2": Case(
        transformers.Dinov2Model, transformers.Dinov2Config, {}, {"embeddings.mask_token"}
    ),
    "clip": Case(transformers.CLIPVisionModel, transformers.CLIPVisionConfig, {}),
    "siglip": Case(
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig,
        {"vision_use_head": False},
    ),
    "beit": Case(
        transformers.BeitModel,
        transformers.BeitConfig,
        {"use_relative_position_bias": True, "use_mean_pooling": True},
    ),
    "beit_shared": Case(
        transformers.BeitModel,
        transformers.BeitConfig,
        {
            "use_shared_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": False,
        },
    ),
    "videomae": Case(
        transformers.VideoMAEModel,
        transformers.VideoMAEConfig,
        {"use_mean_pooling": False, "num_frames": FRAMES},
    ),
}


class Reference(NamedTuple):
    """A PyTorch model saved as users find it, and what it makes of some clips."""

    model: torch.nn.Module
    folder: Path
    case: Case
    image_size: int
    video: np.ndarray  # uint8 [b t h w 3]


def make_reference(name: str, size: str, folder: Path) -> Reference:
    width, depth, heads, hidden, patch, grid = SIZES[size]
    case = VIDEO_CASES[name]
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "patch_size": patch,
        "image_size": patch * grid,
    }
    if name == "dinov2":
        del sizes["intermediate_size"]
        sizes["mlp_ratio"] = 2
    model = case.model_class(case.config_class(**sizes, **case.options)).eval()
    randomize(model)
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (2, FRAMES, patch * grid, patch * grid, 3), dtype=np.uint8)
    return Reference(model, folder, case, patch * grid, video)


def ours(reference: Reference) -> tuple[ModelConfig, dict, Callable[..., VideoFeatures]]:
    """The config that the folder asks for, its parameters, and the encoder."""
    published = open_published(str(reference.folder))
    model = ModelConfig(video=VideoEncoderConfig(**published.fields), dtype="float32")
    read = load_published(str(reference.folder), "video", model)
    assert set(read.unused) == set(reference.case.unused)
    side = reference.image_size // model.video.patch_size
    encoder = VideoEncoder(model.video, (side, side))
    params = jax.tree.map(jnp.asarray, read.params["video_encoder"])

    @jax.jit
    def encode(video, mask=None) -> VideoFeatures:
        layout = model.video.layout
        patches = patchify(normalize_pixels(video, layout), model.video.patch_size, layout.tubelet)
        return encoder.apply({"params": params}, patches, mask)

    return model, read.params, encode


def pixels_of(reference: Reference, model: ModelConfig) -> torch.Tensor:
    """Clips after PyTorch's image processors: [b t 3 h w]."""
    layout = model.video.layout
    scaled = (reference.video / 255.0 - layout.pixel_mean) / layout.pixel_std
    return torch.from_numpy(scaled.transpose(0, 1, 4, 2, 3)).float()


@torch.no_grad()
def theirs(
    module: torch.nn.Module, name: str, pixels: torch.Tensor, prefix: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Normalized patch tokens and frame vectors of the PyTorch model, frames folded."""
    if name == "videomae":
        return module(pixels).last_hidden_state.numpy(), None
    output = module(pixels.flatten(0, 1))
    tokens, cls = output.last_hidden_state, output.last_hidden_state[:, 0]
    if name == "clip":
        tokens, cls = module.post_layernorm(tokens), output.pooler_output
    if name == "siglip":  # a frame is the mean of its patches, which that model has not
        return tokens.numpy(), None
    if name == "beit":
        tokens, cls = module.pooler.layernorm(tokens), output.pooler_output
    return tokens[:, prefix:].numpy(), cls.numpy()


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    actual = np.asarray(actual).reshape(expected.shape)
    difference = np.abs(actual - expected).max()
    assert difference < min(1e-4, TOLERANCE * np.abs(expected).max()), difference


def assert_features(name: str, features: VideoFeatures, module, reference, model) -> None:
    expected, cls = theirs(module, name, pixels_of(reference, model), model.video.layout.prefix)
    assert_close(features.tokens, expected)
    if cls is not None:
        assert_close(features.frame_cls, cls)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", VIDEO_CASES)
def test_a_video_family_goes_in_and_out(name, size, tmp_path):
    reference = make_reference(name, size, tmp_path / "in")
    model, params, encode = ours(reference)
    assert_features(name, encode(reference.video), reference.model, reference, model)

    family = open_published(str(reference.folder)).family
    tensors = write_tensors(params, family, model)
    given = read_folder(reference.folder)
    assert tensors.keys() == given.keys() - reference.case.unused
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, given[key], err_msg=key)

    published = family.published(model.video, reference.image_size, FRAMES)
    model_type = reference.case.config_class.model_type
    again = write_folder(tmp_path / "out", tensors, published | {"model_type": model_type})
    module, info = reference.case.model_class.from_pretrained(again, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert set(info["missing_keys"]) <= reference.case.unused
    assert_features(name, encode(reference.video), module.eval(), reference, model)
    assert open_published(str(again)).fields == open_published(str(reference.folder)).fields


def write_folder(folder: Path, tensors: dict[str, np.ndarray], config: dict) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_masked_clips_of_videomae(tmp_path):
    """The patches that the mask removes are not there, in the one attention over the clip."""
    reference = make_reference("videomae", "small", tmp_path)
    model, _, encode = ours(reference)
    noise = np.random.default_rng(1).random((1, 2, 25), np.float32).repeat(2, axis=0)
    mask = mask_from_noise(jnp.asarray(noise), 0.6)
    pixels = pixels_of(reference, model)
    removed = torch.from_numpy(np.asarray(mask.removed_mask).reshape(2, -1))
    with torch.no_grad():
        expected = reference.model(pixels, bool_masked_pos=removed).last_hidden_state
    assert_close(encode(reference.video, mask).tokens, expected.numpy())


# --- BERT

TEXT = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 56}


def make_bert(folder: Path, layers: int) -> tuple[transformers.BertModel, ModelConfig]:
    config = transformers.BertConfig(
        vocab_size=50, max_position_embeddings=16, num_hidden_layers=layers, **TEXT
    )
    bert = transformers.BertForMaskedLM(config).eval()
    randomize(bert)
    bert.save_pretrained(folder)
    text = TextEncoderConfig(**open_published(str(folder)).fields, max_len=16)
    return bert, ModelConfig(text=text, dtype="float32")


def test_bert_goes_in_and_out(tmp_path):
    bert, model = make_bert(tmp_path / "in", 3)
    read = load_published(str(tmp_path / "in"), "text", model)
    assert not read.unused
    ids = np.random.default_rng(0).integers(0, 50, (3, 9))
    lengths = np.array([9, 4, 1])
    mask = np.arange(9) < lengths[:, None]
    features = TextEncoder(model.text).apply(
        {"params": read.params["text_encoder"]}, jnp.asarray(ids), jnp.asarray(mask)
    )
    with torch.no_grad():
        expected = bert.bert(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state
    assert_close(features.tokens[mask], expected.numpy()[mask])

    tensors = write_tensors(read.params, FAMILIES["bert"], model)
    given = read_folder(tmp_path / "in")
    assert tensors.keys() == {name.removeprefix("bert.") for name in given}
    for name, tensor in given.items():
        np.testing.assert_array_equal(tensors[name.removeprefix("bert.")], tensor, err_msg=name)


def test_upper_layers_of_bert_go_to_the_fusion(tmp_path):
    _, whole = make_bert(tmp_path, 4)
    text = TextEncoderConfig(**{**vars(whole.text), "depth": 1})
    model = ModelConfig(text=text, fusion=FusionConfig(depth=2), dtype="float32")
    read = load_published(str(tmp_path), "text", model)
    given = load_file(tmp_path / "model.safetensors")
    for ours_, theirs_ in (
        ("text_encoder/block_0", 0),
        ("fusion/block_0", 1),
        ("fusion/block_1", 2),
    ):
        part, block = ours_.split("/")
        kernel = read.params[part][block]["mlp"]["up"]["kernel"]
        name = f"bert.encoder.layer.{theirs_}.intermediate.dense.weight"
        np.testing.assert_array_equal(kernel, given[name].T)
    assert len(read.unused) == 16 and all(".layer.3." in name for name in read.unused)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Of the published models: epsilon, mean and deviation of pixels, activation, class of the config.
CONSTANTS = {
    "vit": (1e-12, HALF, "gelu", transformers.ViTConfig),
    "deit": (1e-12, IMAGENET, "gelu", transformers.DeiTConfig),
    "vit_mae": (1e-12, IMAGENET, "gelu", transformers.ViTMAEConfig),
    "dinov2": (1e-6, IMAGENET, "gelu", transformers.Dinov2Config),
    "clip_vision_model": (1e-5, OPENAI, "quick_gelu", transformers.CLIPVisionConfig),
    "siglip_vision_model": (1e-6, HALF, "gelu_tanh", transformers.SiglipVisionConfig),
    "beit": (1e-12, HALF, "gelu", transformers.BeitConfig),
    "videomae": (1e-12, IMAGENET, "gelu", transformers.VideoMAEConfig),
}


def test_every_vision_family_has_its_constants():
    assert set(CONSTANTS) == {name for name, f in FAMILIES.items() if f.part == "video"}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_a_family(name):
    """From an empty config.json: transformers leaves out what is its class's default."""
    eps, (mean, std), activation, config_class = CONSTANTS[name]
    family, theirs = FAMILIES[name], config_class()
    fields = VideoEncoderConfig(**family.fields(family.complete({})))
    layout = fields.layout
    assert (layout.eps, layout.activation) == (eps, activation)
    assert (layout.pixel_mean, layout.pixel_std) == (mean, std)
    assert (eps, activation) == (theirs.layer_norm_eps, ACTIVATIONS[theirs.hidden_act])
    sizes = (theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads)
    assert (fields.width, fields.depth, fields.num_heads, fields.patch_size) == (
        *sizes,
        theirs.patch_size,
    )


def test_epsilons_and_pixels_of_our_own_models():
    assert (BERT_EPS, VIT_EPS, VitLayout.eps) == (1e-12, 1e-6, 1e-6)  # BERT, MAE
    assert transformers.BertConfig().layer_norm_eps == BERT_EPS
    assert (VitLayout.pixel_mean, VitLayout.pixel_std) == IMAGENET
