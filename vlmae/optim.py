"""AdamW, its schedule, and which parameters decay or are frozen."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from vlmae.config import OptimConfig
from vlmae.model_config import ModelConfig
from vlmae.sharding import is_matrix, path_name


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from zero, then a cosine or linear decay to `final_ratio`, by updates done.

    The first update has the rate of 0 updates done (zero, with warm-up).
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_ratio
    decay_steps = steps - config.warmup_steps
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_ratio)
    else:
        decay = optax.linear_schedule(peak, end, decay_steps)
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)

    def rate(updates: Int[Array, ""] | int) -> Float[Array, ""]:
        since = updates - config.warmup_steps
        # Not a `where`: XLA would write the cosine into the update of every single array.
        return jax.lax.cond(since < 0, warmup, lambda _: decay(since), updates)

    return rate


def decay_mask(params: PyTree) -> PyTree:
    """True for the matrices (kernels and embedding tables); biases, norms, tokens do not decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path_name(path)), params)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all arrays of parameters or gradients together.

    As `optax.tree.norm`, but what does not decay is joined first, see `make_optimizer`.
    """
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(decay_mask(tree)), strict=True))
    matrices = [x for x, decays in pairs if decays]
    rest = [x.ravel() for x, decays in pairs if not decays]
    return optax.tree.norm([*matrices, jnp.concatenate(rest)] if rest else matrices)


# What lies below block 0 of an encoder, and is frozen with it.
EMBEDDINGS = {"video": "cls|extra|positions|patch_embed|input_norm", "text": "embeddings"}


def freezes_any(model: ModelConfig) -> bool:
    """True if the config freezes blocks of any encoder."""
    return any(getattr(model, part).adapter.frozen_blocks > 0 for part in EMBEDDINGS)


def is_frozen(name: str, model: ModelConfig) -> bool:
    """True if the config freezes the parameter of this path ("video_encoder/block_0/...")."""
    for part, embeddings in EMBEDDINGS.items():
        found = re.match(rf"{part}_encoder/(?:block_(\d+)|{embeddings})(?:/|$)", name)
        if found:
            return int(found[1] or 0) < getattr(model, part).adapter.frozen_blocks
    return False


def freeze(params: PyTree, model: ModelConfig) -> PyTree:
    """The parameters, the frozen ones without a gradient: what only they need is not computed."""

    def stop(path: tuple, x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(x) if is_frozen(path_name(path), model) else x

    return jax.tree_util.tree_map_with_path(stop, params)


def make_optimizer(
    config: OptimConfig, steps: int, model: ModelConfig | None = None
) -> optax.GradientTransformation:
    """Clipping (if configured), then AdamW with the schedule, where matrices alone decay.

    All that does not decay, some hundred small arrays, is one vector to the optimizer: a much
    smaller program computes the same. Frozen parameters of `model` stay as they are and have no
    state.
    """
    adamw = functools.partial(optax.adamw, make_schedule(config, steps), config.b1, config.b2)
    parts = {
        "decays": adamw(weight_decay=config.weight_decay),
        "stays": optax.flatten(adamw(weight_decay=0.0)),
    }
    freezes = model is not None and freezes_any(model)
    parts |= {"frozen": optax.set_to_zero()} if freezes else {}

    def label(path: tuple, decays: bool) -> str:
        if freezes and is_frozen(path_name(path), model):
            return "frozen"
        return "decays" if decays else "stays"

    def labels(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(label, decay_mask(params))

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.partition(parts, labels))
