"""The benchmark against OpenCLIP: weights go over by name; the models compared are of one size."""

import numpy as np
import pytest
import transformers

from experiments.benchmarks import openclip
from vlmae.config.model import ModelConfig, TextEncoderConfig, VideoEncoderConfig
from vlmae.weights.families import CLIP, CLIP_TEXT
from vlmae.weights.huggingface import merge_trees
from vlmae.weights.tensors import read_tensors

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 6}


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    """Tensors of a small CLIP of transformers, all of them random."""
    config = transformers.CLIPConfig(
        text_config=SIZES | {"hidden_size": 8, "intermediate_size": 32, "vocab_size": 20},
        vision_config=SIZES | {"hidden_size": 12, "intermediate_size": 48, "image_size": 32},
        projection_dim=6,
    )
    state = transformers.CLIPModel(config).state_dict()
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=tuple(x.shape)).astype(np.float32)
        for name, x in state.items()
        if "position_ids" not in name
    }


def test_weights_have_openclip_s_names_and_none_is_lost(published):
    fields = {
        family.part: family.fields(
            family.complete(SIZES | {"hidden_size": width, "intermediate_size": 4 * width} | more)
        )
        for family, width, more in ((CLIP, 12, {}), (CLIP_TEXT, 8, {"vocab_size": 20}))
    }
    model = ModelConfig(
        video=VideoEncoderConfig(**fields["video"]), text=TextEncoderConfig(**fields["text"])
    )
    params = merge_trees(
        [read_tensors(published, family, model).params for family in (CLIP, CLIP_TEXT)]
    )
    state = openclip.to_open_clip(params, model)

    assert sum(x.size for x in state.values()) == sum(x.size for x in published.values())
    for theirs, prefix in (("vision_model", "visual."), ("text_model", "")):
        layer, block = f"{theirs}.encoder.layers.1.", f"{prefix}transformer.resblocks.1."
        for leaf in ("weight", "bias"):
            parts = [published[f"{layer}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            np.testing.assert_array_equal(
                state[f"{block}attn.in_proj_{leaf}"], np.concatenate(parts)
            )
            for name, own in {
                "self_attn.out_proj": "attn.out_proj",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
                "layer_norm1": "ln_1",
                "layer_norm2": "ln_2",
            }.items():
                np.testing.assert_array_equal(
                    state[f"{block}{own}.{leaf}"], published[f"{layer}{name}.{leaf}"]
                )
    vision, text = "vision_model.embeddings.", "text_model.embeddings."
    for own, name in {
        "visual.conv1.weight": f"{vision}patch_embedding.weight",
        "visual.class_embedding": f"{vision}class_embedding",
        "visual.positional_embedding": f"{vision}position_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "token_embedding.weight": f"{text}token_embedding.weight",
        "positional_embedding": f"{text}position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "logit_scale": "logit_scale",
    }.items():
        np.testing.assert_allclose(state[own], published[name], rtol=1e-6)
    np.testing.assert_array_equal(state["visual.proj"], published["visual_projection.weight"].T)
    np.testing.assert_array_equal(state["text_projection"], published["text_projection.weight"].T)


def test_the_loss_is_openclip_s():
    pytest.importorskip("open_clip")
    ours, theirs = openclip.losses_of("S", batch_size=2)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_row_has_a_line_for_each_side():
    row = {
        "size": "S",
        "dropped": 0.5,
        "secs": {"ours": [1.0, 1.2], "fused": [1.5, 1.8]},
        "ratios": {"fused": {"ratio": 1.5, "ratio_range": [1.5, 1.5]}},
        "gib": {"ours": 1.0, "fused": 2.0},
        "first_step_secs": {"ours": 30.4, "fused": 10.0},
        "flops": {"ours": 2e12, "fused": 1.9e12},
        "parameters": {"ours": 6.25e7, "fused": 6.25e7},
    }
    lines = openclip.format_table([row]).splitlines()[2:]
    assert [x.strip() for x in lines[0].strip("|").split("|")] == [
        *("S/16", "0.5", "ours", "1.10", "", "1.00", "30", "2,000", "62.50")
    ]
    assert [x.strip() for x in lines[1].strip("|").split("|")][2:5] == [
        *("OpenCLIP, fused", "1.65", "1.50 (1.50-1.50)")
    ]
