"""The training state, made from a seed."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int, PyTree

from data_pipelines.records import Batch
from vlmae.config import ObjectivesConfig
from vlmae.models.video_language import VideoLanguageModel
from vlmae.objectives import compute_losses


class TrainState(struct.PyTreeNode):
    """Everything that a step changes, and all that a checkpoint holds.

    Shapes and shardings of a state are trees of the same form. The seed never changes; it is here,
    so that the compiled step is the same for every seed, and a compilation cache serves them all.
    """

    seed: PyTree  # int32
    step: PyTree  # int32, steps done
    params: PyTree
    opt_state: PyTree


def init_state(
    seed: Int[Array, ""],
    batch: Batch,
    *,
    model: VideoLanguageModel,
    tx: optax.GradientTransformation,
    objectives: ObjectivesConfig,
) -> TrainState:
    """A new state; exactly the parts that the objectives use get parameters. Jit it."""
    key = jax.random.key(seed)

    def run_objectives(model: VideoLanguageModel, batch: Batch) -> dict:
        return compute_losses(model, batch, key, objectives).metrics

    params = model.init({"params": key, "dropout": key}, batch, method=run_objectives)["params"]
    step = jnp.zeros((), "int32")
    return TrainState(jnp.asarray(seed, "int32"), step, params, tx.init(params))
