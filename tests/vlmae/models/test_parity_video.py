"""Masked encoder, pixel decoder and loss against ViT-MAE in PyTorch, with equal random weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_weights import (
    Weights,
    mae_decoder,
    mae_encoder,
    randomize,
    saved_weights,
    set_sincos_positions,
)
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from vlmae.config.model import ModelConfig, PixelDecoderConfig, VideoEncoderConfig
from vlmae.models.pixel_decoder import PixelDecoder
from vlmae.models.video_encoder import VideoEncoder, VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops.losses import normalize_patches, reconstruction_loss
from vlmae.ops.masking import mask_from_noise

TOLERANCE = 1e-5
CLIPS, FRAMES, SIDE, PATCH, RATIO = 2, 3, 20, 4, 0.65
GRID, NUM_PATCHES = (5, 5), 25
OURS = VideoEncoderConfig(width=48, depth=3, num_heads=4, mlp_dim=80, patch_size=PATCH)
# ViT-MAE gives its decoder's blocks their own hidden width; ours is four times the width.
OURS_DECODER = PixelDecoderConfig(width=32, depth=2, num_heads=2)


class Reference(NamedTuple):
    """Inputs in our layout, the PyTorch model that has run on them, and its weights."""

    video: np.ndarray  # uint8 [b t h w 3]
    noise: np.ndarray  # [b t n]
    model: ViTMAEForPreTraining
    pixels: torch.Tensor  # normalized, [(b t) 3 h w]
    weights: Weights


@pytest.fixture(scope="module")
def reference() -> Reference:
    config = ViTMAEConfig(
        image_size=SIDE,
        patch_size=PATCH,
        mask_ratio=RATIO,
        layer_norm_eps=1e-6,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
    )
    model = ViTMAEForPreTraining(config).eval()
    set_sincos_positions(model)
    randomize(model)
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (CLIPS, FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = ((video / 255 - mean) / std).reshape(-1, SIDE, SIDE, 3).transpose(0, 3, 1, 2)
    noise = rng.random((CLIPS, FRAMES, NUM_PATCHES)).astype(np.float32)
    tensor = torch.tensor(pixels, dtype=torch.float32)
    return Reference(video, noise, model, tensor, saved_weights(model))


def folded_noise(reference: Reference) -> torch.Tensor:
    return torch.tensor(reference.noise.reshape(-1, NUM_PATCHES))


def patches_of(video: np.ndarray) -> jax.Array:
    model = VideoLanguageModel(ModelConfig(video=OURS), image_size=SIDE)
    return model.patches(jnp.asarray(video))


def split_clips(x: torch.Tensor) -> np.ndarray:
    """[(b t) ...] -> [b t ...]."""
    return x.detach().numpy().reshape(CLIPS, FRAMES, *x.shape[1:])


def assert_close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def reconstruct(
    params: dict, patches: jax.Array, noise: jax.Array, normalize: bool
) -> tuple[jax.Array, tuple[VideoFeatures, jax.Array]]:
    """The loss, and the features and predicted pixels behind it."""
    video = VideoEncoder(OURS, GRID).apply(
        {"params": params["encoder"]}, patches, mask_from_noise(noise, RATIO)
    )
    decoder = PixelDecoder(OURS_DECODER, GRID, 3 * PATCH**2)
    pixels = decoder.apply({"params": params["decoder"]}, video).pixels
    target = normalize_patches(patches) if normalize else patches
    return reconstruction_loss(pixels, target, video.removed_mask), (video, pixels)


def copied_params(reference: Reference) -> dict:
    weights = dict(reference.weights)
    params = {"encoder": mae_encoder(weights, 3), "decoder": mae_decoder(weights, 2)}
    assert set(weights) == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    return params


@pytest.fixture(scope="module", params=[True, False], ids=["normalized", "raw"])
def results(request, reference):
    """For both kinds of target: ours, ((loss, (features, pixels)), gradients), and the output."""
    run = jax.value_and_grad(reconstruct, has_aux=True)
    ours = jax.jit(run, static_argnums=3)(
        copied_params(reference), patches_of(reference.video), reference.noise, request.param
    )
    reference.model.config.norm_pix_loss = request.param
    reference.model.zero_grad()
    theirs = reference.model(reference.pixels, noise=folded_noise(reference))
    theirs.loss.backward()
    return ours, theirs


def test_patches(reference):
    expected = split_clips(reference.model.patchify(reference.pixels))
    assert_close(patches_of(reference.video), expected)


def test_masks(results):
    (_, (video, _)), _ = results[0]
    np.testing.assert_array_equal(video.removed_mask, split_clips(results[1].mask) == 1)


def test_hidden_states(reference, results):
    """ViT-MAE leaves the visible patches in the order of their noise, we in that of the frame."""
    (_, (video, _)), _ = results[0]
    with torch.no_grad():
        output = reference.model.vit(reference.pixels, noise=folded_noise(reference))
    tokens = split_clips(output.last_hidden_state)
    kept = np.argsort(reference.noise, axis=-1)[..., : video.patch_ids.shape[-1]]
    ascending = np.argsort(kept, axis=-1)
    assert_close(video.frame_cls, tokens[:, :, 0])
    assert_close(video.tokens, np.take_along_axis(tokens[:, :, 1:], ascending[..., None], axis=2))


def test_predicted_pixels(results):
    (_, (_, pixels)), _ = results[0]
    assert_close(pixels, split_clips(results[1].logits))


def test_loss(results):
    (loss, _), _ = results[0]
    assert_close(loss, results[1].loss.item())


def test_gradients(reference, results):
    """Relative to the largest entry, since gradients are small."""
    _, gradients = results[0]
    model = reference.model
    projection = model.vit.embeddings.patch_embeddings.projection.weight.grad.numpy()
    pairs = (
        (
            gradients["encoder"]["patch_embed"]["kernel"],
            projection.transpose(2, 3, 1, 0).reshape(-1, OURS.width),
        ),
        (gradients["decoder"]["mask_token"], model.decoder.mask_token.grad[0, 0].numpy()),
    )
    for ours, theirs in pairs:
        scale = np.abs(theirs).max()
        assert_close(ours / scale, theirs / scale)
