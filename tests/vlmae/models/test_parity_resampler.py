"""The sampler without pooling against transformers' Perceiver resampler, with equal weights."""

import jax
import numpy as np
import torch
from torch_weights import Weights, dense, norm, randomize
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from vlmae.models.attention import Attention, Source
from vlmae.models.multiway import LatentLayer, Sampler

TOLERANCE = 1e-5
WIDTH, DEPTH, HEADS, LATENTS, TOKENS = 48, 3, 4, 7, 19


def torch_resampler() -> IdeficsPerceiverResampler:
    """Theirs, with the layer norms and the GELU of ours."""
    config = IdeficsConfig(
        vision_config={"embed_dim": WIDTH}, perceiver_config={"qk_layer_norms_perceiver": False}
    )
    model = IdeficsPerceiverResampler(config, WIDTH, DEPTH, HEADS, WIDTH // HEADS, LATENTS).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    for _, mlp in model.blocks:
        mlp.act = torch.nn.GELU()
    randomize(model)
    return model


def weights_of(model: torch.nn.Module) -> Weights:
    """The saved weights, with zeros for the biases that its linear layers lack."""
    weights = {name: x.numpy() for name, x in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.bias is None
            weights[f"{name}.bias"] = np.zeros(module.out_features, np.float32)
    return weights


def way_layer(weights: Weights, name: str) -> dict:
    """A block of theirs: attention and feed-forward network."""
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "output_proj"}
    return {
        "attention": {ours: dense(weights, f"{name}.0.{theirs}") for ours, theirs in parts.items()},
        "norm": norm(weights, f"{name}.0.latents_layer_norm"),
        "source_norm": norm(weights, f"{name}.0.context_layer_norm"),
        "mlp": {"up": dense(weights, f"{name}.1.fc"), "down": dense(weights, f"{name}.1.c_proj")},
        "mlp_norm": norm(weights, f"{name}.1.ln"),
    }


def test_sampler_without_pooling_is_the_perceiver_resampler():
    reference = torch_resampler()
    source = np.random.default_rng(0).normal(size=(4, TOKENS, WIDTH)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.tensor(source)).numpy()
    weights = weights_of(reference)
    params = {
        "latents": weights.pop("latents"),
        "norm": norm(weights, "layer_norm"),
        **{f"layers_{i}": way_layer(weights, f"blocks.{i}") for i in range(DEPTH)},
    }
    assert not weights, "every weight has its place"
    layers = tuple(LatentLayer(Attention(HEADS), 4 * WIDTH) for _ in range(DEPTH))
    sampler = Sampler(LATENTS, "none", layers, HEADS)
    latents = jax.jit(sampler.apply)({"params": params}, Source(source))
    assert latents.shape == (4, LATENTS, WIDTH)
    np.testing.assert_allclose(latents, expected, rtol=0, atol=TOLERANCE)
