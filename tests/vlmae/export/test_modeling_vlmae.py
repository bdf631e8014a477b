"""The exported PyTorch module against the JAX model: every option, equal random parameters."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from exported_models import (
    FRAMES,
    OPTIONS,
    description,
    exported_with,
    random_answers,
    random_clips,
    random_params,
    random_texts,
)
from jaxtyping import PyTree

from vlmae.export import modeling_vlmae
from vlmae.models.layers import uniform_noise
from vlmae.models.scoring import match_scores, rank_answers
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops import losses
from vlmae.ops.masking import mask_from_noise
from vlmae.ops.multiple_choice import Caption
from vlmae.weights.export_format import Exported
from vlmae.weights.torch_names import to_torch

TOLERANCE = 1e-5
RATIO, TOP_K = 0.4, 4


def adapters(kind: str, **frozen_blocks: int) -> dict:
    fields = {"kind": kind, "width": 8}
    changes = {}
    for part, count in frozen_blocks.items():
        fields["frozen_blocks"] = count
        changes |= {f"model.{part}.adapter.{name}": value for name, value in fields.items()}
    return changes


TIME = {"model.video.time_frames": 3, "model.video.time_depth": 2}


def pruned(score: str, rest: str = "fuse", **changes) -> dict:
    return changes | {
        "model.video.depth": 3,
        "model.video.sparsify.eval_keep_rate": 0.7,
        "model.video.sparsify.stages": (0, 1),
        "model.video.sparsify.score": score,
        "model.video.sparsify.rest": rest,
    }


def multiway(pooling: str, guidance: str, share: bool = True) -> dict:
    return {
        "model.fusion.kind": "multiway",
        "model.fusion.sampler.video_latents": 5,
        "model.fusion.sampler.text_latents": 3,
        "model.fusion.sampler.pooling": pooling,
        "model.fusion.sampler.guidance": guidance,
        "model.fusion.sampler.share_attention": share,
    }


def selector(kind: str, frames: int = 0) -> dict:
    return {
        "model.selector.kind": kind,
        "model.selector.frames": frames,
        "model.selector.width": 8,
    }


def layout(**fields: Any) -> dict:
    return {f"model.video.layout.{name}": value for name, value in fields.items()}


WIDER = {"model.video.width": 24}  # than the text
LEARNED = {"model.video.positions": "learned"}
CONFIGS = {
    "cross_attention": adapters("side", text=1)
    | TIME
    | selector("mlp", 3)
    | {"model.fusion.depth": 2},
    "pruned": pruned("cls_attention") | multiway("block", "context") | WIDER,
    "separate": pruned("norm")
    | multiway("global", "queries", share=False)
    | adapters("inline", video=1, text=1)
    | {"model.text.pooling": "mean"},
    "baselines": pruned("random") | multiway("mean", "none") | selector("random"),
    "concat": {"model.fusion.kind": "concat"} | WIDER | LEARNED | selector("transformer"),
    "resampler": multiway("attention", "context") | selector("uniform"),
    "clip_text": {
        f"model.text.layout.{name}": value
        for name, value in {
            "pre_norm": True,
            "causal": True,
            "eps": 1e-3,
            "activation": "quick_gelu",
        }.items()
    }
    | {"objectives.mlm": 0.0}
    | adapters("side", text=1)
    | selector("mlp", 2),
}
VIDEO_CONFIGS = {
    "dropped": pruned("mean_attention", "drop") | TIME,
    "merged": pruned("cls_attention", "merge") | TIME,
    "merged_beit": pruned("cls_attention", "merge")
    | layout(relative_bias="layer", frame_cls="mean")
    | {"model.video.positions": "none"},
    "time": {"model.video.time_frames": 6},
    "clip": LEARNED
    | layout(
        input_norm=True,
        activation="gelu_tanh",
        eps=1e-3,
        pixel_mean=(0.1, 0.5, 0.9),
        pixel_std=(0.5, 0.6, 0.7),
    ),
    "beit": pruned("cls_attention")
    | layout(relative_bias="layer", layer_scale=0.1, frame_cls="mean", eps=1e-12)
    | {"model.video.positions": "none"},
    "beit_shared": pruned("mean_attention") | layout(relative_bias="shared") | LEARNED,
    "deit": layout(extra_tokens=1, tubelet=2) | LEARNED | TIME,
    "video_mae": layout(tubelet=2, joint=True, cls_token=False, frame_cls="mean")
    | {"model.video.positions": "sincos_clip"}
    | adapters("side", video=2),
}


def video_outputs(model: VideoLanguageModel | modeling_vlmae.VideoLanguageModel, video, mask):
    """Runs either model on whole clips, masked clips, and images; the mask is the model's own."""
    whole, masked = model.encode_video(video), model.encode_video(video, mask)
    return {
        "whole": whole,
        "masked": masked,
        "image": model.encode_video(video[:, :1]),
        "vectors": model.embed_video(masked),
        "pixels": model.decode_pixels(masked),
    }


def our_pairs(model: VideoLanguageModel, video, patch_mask, ids, mask) -> dict:
    """Runs the model on texts and masked clips."""
    clips, text = model.encode_video(video, patch_mask), model.encode_text(ids, mask)
    fused = model.fuse(clips, text)
    similarity = losses.similarity(model.embed_video(clips), model.embed_text(text))
    answers, choice = Caption(*map(jnp.asarray, random_answers())), model.choose_frames(clips, text)
    return {
        "clips": clips,
        "text": text.tokens,
        "vectors": model.embed_text(text),
        "similarity": similarity,
        "logits": similarity / model.temperature() + model.logit_bias(),
        "choice": None if choice is None else (choice.frames, choice.scores),
        "fused": fused,
        "match": match_scores(model, clips, text),
        "options": model.choose(fused, OPTIONS),
        "classes": model.classify(fused),
        "answers": rank_answers(model, clips, text, answers, TOP_K),
        "words": model.predict_words(model.fused_words(text, fused)),
    }


def their_pairs(model: modeling_vlmae.VideoLanguageModel, video, kept_ids, ids, mask) -> dict:
    clips, text = model.encode_video(video, kept_ids), model.encode_text(ids, mask)
    answers = tuple(torch.tensor(x) for x in random_answers())
    return {
        "clips": clips,
        "text": text.tokens,
        "vectors": model.embed_text(text),
        "similarity": model.similarity(clips, text),
        "logits": model.logits(clips, text),
        "choice": model.choose_frames(clips, text),
        "fused": model.fuse(clips, text),
        "match": model.match(clips, text),
        "options": model.choose(clips, text),
        "classes": model.answer(clips, text),
        "answers": model.answer(clips, text, answers, TOP_K),
        "words": model.word_logits(clips, text),
    }


def compare(changes: dict, our_method, their_method, *texts: np.ndarray) -> None:
    """Checks that both models give equal outputs, to 1e-5 of an output's scale."""
    exported, video = exported_with(changes), random_clips()
    params = random_params(exported)
    times = FRAMES // exported.model.video.layout.tubelet
    noise = np.random.default_rng(3).random((len(video), times, 16)).astype(np.float32)
    model = VideoLanguageModel(exported.model, exported.image_size)
    run = jax.jit(functools.partial(model.apply, method=our_method))
    mask = mask_from_noise(jnp.asarray(noise), RATIO)
    expected = jax.device_get(run({"params": params}, video, mask, *texts))

    torch_version = in_torch(exported, params)
    kept_ids = modeling_vlmae.random_mask(torch.tensor(noise), RATIO)
    with torch.no_grad():
        inputs = (torch.tensor(video), kept_ids, *map(torch.tensor, texts))
        actual = their_method(torch_version, *inputs)
    for name, value in expected.items():
        pairs = zip(jax.tree.leaves(value), jax.tree.leaves(actual[name]), strict=True)
        for left, right in pairs:
            scale = max(1.0, np.abs(left).max())
            options = {"rtol": 0, "atol": TOLERANCE * scale, "err_msg": name}
            np.testing.assert_allclose(right.numpy(), left, strict=left.dtype == "f4", **options)


def in_torch(exported: Exported, params: PyTree) -> modeling_vlmae.VideoLanguageModel:
    """The PyTorch module of an export with these parameters."""
    model = modeling_vlmae.VideoLanguageModel(description(exported)).eval()
    model.load_state_dict({name: torch.tensor(x) for name, x in to_torch(params).items()})
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_and_clips(name):
    compare(CONFIGS[name], our_pairs, their_pairs, *random_texts())


@pytest.mark.parametrize("name", VIDEO_CONFIGS)
def test_clips_alone(name):
    compare(VIDEO_CONFIGS[name], video_outputs, video_outputs)


def test_logits_without_a_bias_are_similarities_over_the_temperature():
    exported = exported_with({})
    parts = tuple(part for part in exported.parts if part != "logit_bias")
    params = {name: x for name, x in random_params(exported).items() if name != "logit_bias"}
    model = in_torch(exported._replace(parts=parts), params)
    similarity = torch.eye(2)
    torch.testing.assert_close(model.scale_similarity(similarity), similarity / 0.1)


def test_the_baselines_draw_the_same_noise():
    """Without a key, JAX draws by key 0."""

    class Drawing(nn.Module):
        def __call__(self, count: int):
            return uniform_noise(self, (2, count))

    for count in (1, 7, 196):
        expected = np.asarray(Drawing().apply({}, count))
        np.testing.assert_array_equal(modeling_vlmae.baseline_noise(count).numpy(), expected[1])


def test_equal_noise_masks_equal_patches():
    noise = np.round(np.random.default_rng(0).random((2, 3, 16)), 1).astype(np.float32)  # with ties
    kept = modeling_vlmae.random_mask(torch.tensor(noise), 0.65)
    np.testing.assert_array_equal(kept.numpy(), mask_from_noise(jnp.asarray(noise), 0.65).kept_ids)


def test_torch_export_traces_the_model_for_any_batch():
    """ONNX and compilers start from a graph with a symbolic batch."""
    layouts = layout(relative_bias="layer") | TIME | selector("mlp")
    exported = exported_with(pruned("cls_attention") | multiway("block", "context") | layouts)
    model = in_torch(exported, random_params(exported))
    inputs = tuple(map(torch.tensor, (random_clips(), *random_texts())))
    batch = ({0: torch.export.Dim("b", max=64)},) * len(inputs)
    graph = torch.export.export(model, inputs, dynamic_shapes=batch).module()
    more = tuple(torch.cat([x, x.flip(0)]) for x in inputs)
    with torch.no_grad():
        torch.testing.assert_close(graph(*more), model(*more), rtol=0, atol=1e-6)
