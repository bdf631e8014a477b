"""AdamW, its schedule, and which parameters decay."""

import jax
import optax
from jaxtyping import PyTree

from vlmae.config import OptimConfig
from vlmae.sharding import path_name


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
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def decay_mask(params: PyTree) -> PyTree:
    """True for the matrices (kernels and embedding tables); biases, norms, tokens do not decay."""

    def decays(path: tuple, _) -> bool:
        return path_name(path).rsplit("/", 1)[-1] in ("kernel", "embedding")

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping (if configured), then AdamW with the schedule and the decay mask."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adamw)
