"""Weights of transformers' PyTorch models as parameters of ours.

Weights are read from the saved file, whose names stay the same from release to release. Every
function takes what it uses out of `weights`, so that a test can see whether anything is left.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import PreTrainedModel, ViTMAEForPreTraining

Weights = dict[str, np.ndarray]


def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Adds noise to every trainable parameter, so that no bias is zero and no scale is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def set_sincos_positions(model: ViTMAEForPreTraining) -> None:
    """Fills the fixed positions by transformers' own code; some releases leave them at zero."""
    for part in (*model.parameters(), model.vit.embeddings.patch_embeddings.projection):
        part._is_hf_initialized = False
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(model.vit.embeddings.patch_embeddings.num_patches)
    assert model.vit.embeddings.position_embeddings.any()
    assert model.decoder.decoder_pos_embed.any()


def saved_weights(model: PreTrainedModel) -> Weights:
    """Returns the arrays that `save_pretrained` writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def dense(weights: Weights, name: str) -> dict:
    """Reads a linear layer; torch stores the kernel as (out, in)."""
    return {"kernel": weights.pop(f"{name}.weight").T, "bias": weights.pop(f"{name}.bias")}


def norm(weights: Weights, name: str) -> dict:
    """Reads a layer norm."""
    return {"scale": weights.pop(f"{name}.weight"), "bias": weights.pop(f"{name}.bias")}


def attention(weights: Weights, parts: str, out: str) -> dict:
    """Reads query, key and value below the name `parts`, and the output projection `out`."""
    params = {part: dense(weights, f"{parts}.{part}") for part in ("query", "key", "value")}
    return params | {"out": dense(weights, out)}


def bert_layer(weights: Weights, name: str) -> dict:
    """Reads a layer of BERT, or of BLIP's text model, which may have cross-attention."""
    params = {
        "mlp": {
            "up": dense(weights, f"{name}.intermediate.dense"),
            "down": dense(weights, f"{name}.output.dense"),
        },
        "mlp_norm": norm(weights, f"{name}.output.LayerNorm"),
    }
    for ours, theirs in (("attention", "attention"), ("cross_attention", "crossattention")):
        part = f"{name}.{theirs}"
        if f"{part}.self.query.weight" in weights:
            params[ours] = attention(weights, f"{part}.self", f"{part}.output.dense")
            params[f"{ours}_norm"] = norm(weights, f"{part}.output.LayerNorm")
    return params


def bert_embeddings(weights: Weights, name: str) -> dict:
    """Reads the three tables of BERT and their norm."""
    tables = {
        table: {"embedding": weights.pop(f"{name}.{table}_embeddings.weight")}
        for table in ("word", "position", "token_type")
    }
    return tables | {"norm": norm(weights, f"{name}.LayerNorm")}


def blocks(layer, weights: Weights, name: str, depth: int) -> dict:
    """Reads `depth` layers by the function `layer`."""
    return {f"block_{i}": layer(weights, f"{name}.{i}") for i in range(depth)}


def vit_layer(weights: Weights, name: str) -> dict:
    """Reads a layer of ViT or ViT-MAE."""
    part = f"{name}.attention"
    return {
        "attention": attention(weights, f"{part}.attention", f"{part}.output.dense"),
        "attention_norm": norm(weights, f"{name}.layernorm_before"),
        "mlp": {
            "up": dense(weights, f"{name}.intermediate.dense"),
            "down": dense(weights, f"{name}.output.dense"),
        },
        "mlp_norm": norm(weights, f"{name}.layernorm_after"),
    }


def mae_encoder(weights: Weights, depth: int) -> dict:
    """Reads ViT-MAE's encoder; the patch convolution becomes a matrix over (y, x, rgb)."""
    name = "vit.embeddings.patch_embeddings.projection"
    kernel = weights.pop(f"{name}.weight").transpose(2, 3, 1, 0)
    return {
        "patch_embed": {
            "kernel": kernel.reshape(-1, kernel.shape[-1]),
            "bias": weights.pop(f"{name}.bias"),
        },
        "cls": weights.pop("vit.embeddings.cls_token")[0, 0],
        "norm": norm(weights, "vit.layernorm"),
        **blocks(vit_layer, weights, "vit.encoder.layer", depth),
    }


def mae_decoder(weights: Weights, depth: int) -> dict:
    """Reads ViT-MAE's decoder."""
    return {
        "embed": dense(weights, "decoder.decoder_embed"),
        "mask_token": weights.pop("decoder.mask_token")[0, 0],
        "norm": norm(weights, "decoder.decoder_norm"),
        "pixels": dense(weights, "decoder.decoder_pred"),
        **blocks(vit_layer, weights, "decoder.decoder_encoder.layer", depth),
    }
