"""The multiway fusion (MuLTI) in NumPy, with the sizes and inputs that its tests share."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from helpers import SMALL, randomize
from jaxtyping import PyTree
from oracles import attend, dense, feed_forward, layer_norm, softmax

KEY = jax.random.key(5)
TEXT = SMALL.model.text
WIDTH, HEADS, HIDDEN, DEPTH = TEXT.width, TEXT.num_heads, TEXT.mlp_dim, 2
LATENTS = 3  # of a sampler alone and of the text; two of the texts are shorter
LENGTHS = np.array([6, 2, 4, 1], np.int32)
POOLINGS = ["block", "global", "mean", "attention", "none"]
WAYS = ["text", "video", "fused"]


def assert_close(actual: PyTree, expected: PyTree, scale: float = 1.0) -> None:
    compare = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * scale)
    jax.tree.map(compare, actual, expected)


def float64(params: PyTree) -> PyTree:
    return jax.tree.map(np.float64, params)


def random_params(init, *inputs) -> PyTree:
    """Draws noise around one for scales and zero for all else, in the shapes of `init`."""

    def start(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.full(x.shape, path[-1].key == "scale", np.float32)

    variables = jax.eval_shape(init, KEY, *inputs)
    params = randomize(jax.tree.map_with_path(start, variables.get("params", {})))
    return jax.tree.map(jnp.asarray, params)


# --- oracles; they mask by `valid` [b k] and put the source first, which must not matter


def join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=1)


def way_layer(z, source, valid, p: dict, attention: dict) -> np.ndarray:
    normed = layer_norm(z, p["norm"])
    context = join(layer_norm(source, p["source_norm"]), normed) if source.size else normed
    seen = join(valid, np.ones(z.shape[:2], bool))
    z = z + attend(normed, context, seen, attention)
    return z + feed_forward(layer_norm(z, p["mlp_norm"]), p["mlp"])


def pool_row(kind: str, queries: np.ndarray, x: np.ndarray, p: dict) -> np.ndarray:
    """Computes `AdaptPooling` for one row without padding: [s d], [n d] -> [s d]."""
    s, n = len(queries), len(x)
    if kind == "attention":
        normed = layer_norm(queries, p["norm"])[None], layer_norm(x, p["source_norm"])[None]
        return attend(*normed, np.ones((1, n), bool), p["attention"])[0]
    if kind == "mean":
        scores = np.zeros((s, n))
    else:
        scores = np.broadcast_to(dense(layer_norm(x, p["source_norm"]), p["importance"]).T, (s, n))
    pooled = []
    for i in range(s):
        block = slice(i * n // s, math.ceil((i + 1) * n / s)) if kind != "global" else slice(n)
        pooled.append(softmax(scores[i, block]) @ x[block])
    return np.stack(pooled)


def sampler(z, source, valid, pooling, p, layers, guide=None, guide_in="none") -> np.ndarray:
    """Computes `Sampler`; z: learned queries; layers: parameters (layer, its attention)."""
    z = np.broadcast_to(z, (len(source), *z.shape))
    if pooling != "none":
        rows = zip(z, source, valid, strict=True)
        z = z + np.stack([pool_row(pooling, q, x[v], p["pooling"]) for q, x, v in rows])
    count = z.shape[1]
    if guide_in == "queries":
        z = join(z, guide)
    if guide_in == "context":
        source, valid = join(source, guide), join(valid, np.ones(guide.shape[:2], bool))
    for layer, attention in layers:
        z = way_layer(z, source, valid, layer, attention)
    return layer_norm(z[:, :count], p["norm"])
