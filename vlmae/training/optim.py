"""AdamW with its schedule, weight decay of matrices alone, and frozen parameters."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from vlmae.config.experiment import OptimConfig
from vlmae.config.model import ModelConfig, TextEncoderConfig, VideoEncoderConfig
from vlmae.parallel.sharding import is_matrix, path_name


class OptimValues(NamedTuple):
    """Numbers of AdamW and its schedule: inputs of a compiled step, not constants of it.

    So runs that differ in nothing else share one program.
    """

    peak: PyTree  # float32, like the next three
    final_ratio: PyTree
    weight_decay: PyTree
    is_cosine: PyTree  # bool; else linear
    warmup_steps: PyTree  # int32, like the next two
    decay_start: PyTree
    decay_steps: PyTree


def optim_values(config: OptimConfig, steps: int) -> OptimValues:
    """Compute the numbers of a run of `steps`.

    wsd stays at the peak until its decay begins, so runs of other lengths share their steps up to
    there (warm-up, stable, decay: Hu et al. 2024, MiniCPM, section 4).
    """
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, steps - round(config.decay_share * steps))
    return OptimValues(
        peak=np.float32(config.learning_rate),
        final_ratio=np.float32(config.final_ratio),
        weight_decay=np.float32(config.weight_decay),
        is_cosine=np.bool_(config.schedule == "cosine"),
        warmup_steps=np.int32(config.warmup_steps),
        decay_start=np.int32(start),
        decay_steps=np.int32(max(1, steps - start - 1)),  # the last update has rate(steps - 1)
    )


def learning_rate(values: OptimValues, updates: Int[Array, ""] | int) -> Float[Array, ""]:
    """Compute the rate after `updates`: linear warm-up from zero, then decay to `final_ratio`.

    The first update has that of 0, zero with warm-up, and the last one `final_ratio` of the peak.
    """

    def warmup(_: Array) -> Array:
        return values.peak * updates / jnp.maximum(values.warmup_steps, 1)

    def decay(shape: Callable[[Array], Array], done: Array) -> Array:
        left = shape((values.decay_steps - done) / values.decay_steps)  # from 1 to exactly 0
        return values.peak * ((1 - values.final_ratio) * left + values.final_ratio)

    cosine = functools.partial(decay, lambda left: 0.5 * (1 - jnp.cos(jnp.pi * left)))
    linear = functools.partial(decay, lambda left: left)
    done = jnp.clip(updates - values.decay_start, 0, values.decay_steps)
    # Not a `where`: XLA would compute the cosine again in the update of every single array.
    branch = jnp.where(updates < values.warmup_steps, 0, jnp.where(values.is_cosine, 1, 2))
    return jax.lax.switch(branch, (warmup, cosine, linear), done)


def decay_mask(params: PyTree) -> PyTree:
    """Mark the parameters that decay: matrices, but no biases, norms or single tokens."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path_name(path)), params)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Compute the Euclidean norm of all parameters or gradients together.

    As `optax.tree.norm`, but the small arrays that do not decay are joined first, which makes a
    much smaller program, see `make_optimizer`.
    """
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(decay_mask(tree)), strict=True))
    matrices = [x for x, decays in pairs if decays]
    rest = [x.ravel() for x, decays in pairs if not decays]
    return optax.tree.norm([*matrices, jnp.concatenate(rest)] if rest else matrices)


# Parameters that block 0 of an encoder needs, as regular expressions; frozen together with it. A
# bias table that all blocks share is one of them: learning, it would change the frozen blocks.
EMBEDDINGS = {
    "video": "cls|extra|positions|patch_embed|input_norm|relative_bias/shared",
    "text": "embeddings",
}


def freezes_any(model: ModelConfig) -> bool:
    """Return True if the config freezes blocks of any encoder."""
    return any(_encoder(model, part).adapter.frozen_blocks > 0 for part in EMBEDDINGS)


def encoder_layer(name: str) -> tuple[str, int] | None:
    """Find the encoder and the layer of the parameter at a path ("video_encoder/block_0/...").

    Layer 0 are the embeddings, layer i + 1 is block i. None: it belongs to what reads the blocks.
    """
    for part, embeddings in EMBEDDINGS.items():
        own = r"(?:relative_bias/)?block_(\d+)"
        found = re.match(rf"{part}_encoder/(?:{own}|{embeddings})(?:/|$)", name)
        if found:
            return part, int(found[1]) + 1 if found[1] else 0
    return None


def is_frozen(name: str, model: ModelConfig) -> bool:
    """Return True if the config freezes the parameter at a path; embeddings go with block 0."""
    found = encoder_layer(name)
    return found is not None and max(1, found[1]) <= _encoder(model, found[0]).adapter.frozen_blocks


def rate_factor(name: str, model: ModelConfig, decay: float) -> float:
    """Compute the share of the learning rate that the parameter at a path learns with.

    It is decay^(depth + 1 - layer) in an encoder of `depth` blocks, see `encoder_layer`, and 1
    above them: temporal blocks, adapters, fusion and heads (BEiT's and MAE's rule for finetuning).
    A bias table that all blocks share has 1, as in BEiT.
    """
    found = encoder_layer(name)
    if found is None or name.startswith("video_encoder/relative_bias/shared"):
        return 1.0
    part, layer = found
    return decay ** (_encoder(model, part).depth + 1 - layer)


def _encoder(model: ModelConfig, part: str) -> VideoEncoderConfig | TextEncoderConfig:
    return model.video if part == "video" else model.text


def freeze(params: PyTree, model: ModelConfig) -> PyTree:
    """Stop gradients of frozen parameters, so that no backward pass is computed for them."""

    def stop(path: tuple, x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(x) if is_frozen(path_name(path), model) else x

    return jax.tree_util.tree_map_with_path(stop, params)


def make_optimizer(
    config: OptimConfig, values: OptimValues, model: ModelConfig | None = None
) -> optax.GradientTransformation:
    """Make the optimizer: gradient clipping if configured, then AdamW with its schedule.

    Only matrices decay. The hundreds of small arrays that do not are one vector to the optimizer: a
    much smaller program computes the same. Frozen parameters of `model` never change and have no
    state. Of `config` it reads what shapes the program: betas, the norm to clip to, and the decay
    of the rate from layer to layer of `model`.
    """
    schedule = functools.partial(learning_rate, values)
    adamw = functools.partial(optax.adamw, schedule, config.b1, config.b2)
    # `optax.flatten` joins the small arrays; on a matrix it would undo the sharding.
    parts = {
        "decays": adamw(weight_decay=values.weight_decay),
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
    steps = [clip, optax.partition(parts, labels)]
    if model is not None and config.layer_decay != 1:
        steps.append(scale_by_layer(model, config.layer_decay))
    return optax.chain(*steps)


def scale_by_layer(model: ModelConfig, decay: float) -> optax.GradientTransformation:
    """Multiply each update by its `rate_factor`.

    After AdamW, whose updates are linear in the rate, weight decay included: so a rate for each
    layer needs neither its own group of parameters nor a state.
    """

    def scale(path: tuple, update: Array) -> Array:
        return update * rate_factor(path_name(path), model, decay)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
