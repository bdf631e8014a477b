"""An encoder as a folder of transformers' own classes: equal features, or a line that says why."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from exported_models import CLIPS, FRAMES, config_with, random_clips, random_texts, save_run

from vlmae.config.experiment import ExperimentConfig
from vlmae.export import command
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.runs.checkpoint import load_params

TOLERANCE = 1e-5
ENCODERS = {"objectives.vtm": 0.0, "objectives.mlm": 0.0, "objectives.mvm": 0.0}


def layout(**fields) -> dict:
    return {f"model.video.layout.{name}": value for name, value in fields.items()}


LEARNED = {"model.video.positions": "learned"}
VIDEO_CASES = {
    "ViTModel": {},
    "ViTModel, learned positions": LEARNED | layout(pixel_mean=(0.2, 0.5, 0.7), eps=1e-3),
    "DeiTModel": layout(extra_tokens=1),
    "Dinov2Model": LEARNED | layout(layer_scale=0.1),
}


def run_with(changes: dict, folder: Path) -> tuple[ExperimentConfig, Path]:
    """A run that trained the encoders alone."""
    config = config_with(ENCODERS | changes)
    return config, save_run(config, folder)


def loaded(model_class: type, folder: Path, **options) -> torch.nn.Module:
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("unexpected_keys", "mismatched_keys"))
    assert set(info["missing_keys"]) <= {"embeddings.mask_token"}  # of DINOv2: no input has it
    return model.eval()


def assert_close(actual, expected) -> None:
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * scale)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[ExperimentConfig, Path]:
    return run_with({"model.text.depth": 2}, tmp_path_factory.mktemp("run"))


def test_the_text_encoder_is_a_bert(plain, tmp_path):
    config, workdir = plain
    command.export(workdir, tmp_path / "out", component="text")
    bert = loaded(transformers.BertModel, tmp_path / "out", add_pooling_layer=False)
    ids, mask = random_texts()
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        actual = bert(**inputs).last_hidden_state.numpy()
    model, params = build_model(config), load_params(workdir)[0]
    run = jax.jit(lambda *x: model.apply(*x, method=VideoLanguageModel.encode_text))
    expected = run({"params": params}, ids, mask).tokens
    assert_close(actual[mask], expected[mask])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(["w7"])["input_ids"] == [[1, 7, 2]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "BertModel.from_pretrained(" in card and "video_encoder " not in card


@pytest.mark.parametrize("name", VIDEO_CASES)
def test_the_video_encoder_is_a_vit(name, tmp_path):
    config, workdir = run_with(VIDEO_CASES[name], tmp_path / "run")
    command.export(workdir, tmp_path / "out", component="video")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    model_class = name.split(",")[0]
    assert described["architectures"] == [model_class]
    options = {} if model_class == "Dinov2Model" else {"add_pooling_layer": False}
    vit = loaded(getattr(transformers, model_class), tmp_path / "out", **options)
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    video = random_clips()
    pixels = (video / 255 - processor["image_mean"]) / processor["image_std"]
    pixels = torch.tensor(pixels, dtype=torch.float32).flatten(0, 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        tokens = vit(pixels).last_hidden_state.unflatten(0, (CLIPS, FRAMES)).numpy()
    model, params = build_model(config), load_params(workdir)[0]
    run = jax.jit(lambda *x: model.apply(*x, method=VideoLanguageModel.encode_video))
    expected = run({"params": params}, video)
    assert_close(tokens[:, :, 0], expected.frame_cls)
    assert_close(tokens[:, :, config.model.video.layout.prefix :], expected.tokens)


REFUSED = {
    "time_depth": (
        {"model.video.time_depth": 1},
        "it mixes frames over time .model.video.time_depth=1.",
    ),
    "thinning": (
        {"model.video.sparsify.eval_keep_rate": 0.7, "model.video.sparsify.stages": (1,)},
        "it prunes its tokens .model.video.sparsify.eval_keep_rate=0.7.",
    ),
    "adapter": (
        {"model.video.adapter.frozen_blocks": 1, "model.video.adapter.width": 8},
        "model.video.adapter adds to its blocks",
    ),
    "layout": (
        layout(extra_tokens=2),
        "for a ViTModel model.video.layout.extra_tokens is 2, must be 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_class_computes_is_refused_in_one_line(name, tmp_path):
    changes, message = REFUSED[name]
    _, workdir = run_with(changes, tmp_path / "run")
    with pytest.raises(ValueError, match=f"no class of transformers .*{message}") as error:
        command.export(workdir, tmp_path / "out", component="video")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_text_encoder_with_adapters_is_no_bert(tmp_path):
    changes = {"model.text.adapter.frozen_blocks": 1, "model.text.adapter.width": 8}
    _, workdir = run_with(changes, tmp_path / "run")
    with pytest.raises(ValueError, match=r"no BertModel: model\.text\.adapter adds to its layers"):
        command.export(workdir, tmp_path / "out", component="text")
