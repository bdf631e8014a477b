"""Layers in plain NumPy, where `p` holds a layer's parameters, and random inputs for both."""

import math

import numpy as np
from einops import rearrange


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def dense(x: np.ndarray, p: dict) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def layer_norm(x: np.ndarray, p: dict, eps: float = 1e-6) -> np.ndarray:
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * p["scale"] + p["bias"]


def feed_forward(x: np.ndarray, p: dict) -> np.ndarray:
    return dense(gelu(dense(x, p["up"])), p["down"])


def attend(
    x: np.ndarray, context: np.ndarray, valid: np.ndarray, p: dict, num_heads: int = 2
) -> np.ndarray:
    """Attends from x [b q d] to those tokens of the context [b k e] that are `valid` [b k]."""
    parts = dense(x, p["query"]), dense(context, p["key"]), dense(context, p["value"])
    query, key, value = (rearrange(y, "b l (h d) -> b h l d", h=num_heads) for y in parts)
    logits = query @ key.swapaxes(2, 3) / math.sqrt(query.shape[-1])
    weights = softmax(np.where(valid[:, None, None], logits, -np.inf))
    return dense(rearrange(weights @ value, "b h l d -> b l (h d)"), p["out"])
