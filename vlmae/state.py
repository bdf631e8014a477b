"""The training state: made from a seed, or filled from another run's parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int, PyTree

from data_pipelines.records import Batch
from vlmae.config import ObjectivesConfig
from vlmae.models.video_language import VideoLanguageModel
from vlmae.objectives import compute_losses
from vlmae.positions import fit_positions
from vlmae.sharding import path_name


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


class LoadReport(NamedTuple):
    """What `merge_params` did, parameter by parameter."""

    loaded: list[str]
    resized: list[str]  # positions of another size, with both shapes
    missing: list[str]  # in the model, not in the source: keep their initial values
    unused: list[str]  # in the source, not in the model
    mismatched: list[str]  # in both, with both shapes

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} parameters"]
        for name in ("resized", "missing", "unused", "mismatched"):
            lines += [f"  {name}: {entry}" for entry in getattr(self, name)]
        return "\n".join(lines)


def merge_params(params: PyTree, source: PyTree) -> tuple[PyTree, LoadReport]:
    """Replaces the parameters that `source` has under the same path with the same shape.

    Learned positions of another size are resized, see `fit_positions`.
    """
    given = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(source)}
    report = LoadReport([], [], [], [], [])

    def choose(path: tuple, x: Array) -> Array:
        name = path_name(path)
        if name not in given:
            report.missing.append(name)
            return x
        found = given.pop(name)
        entry = f"{name}: {found.shape} in the source, {x.shape} in the model"
        if found.shape == x.shape:
            report.loaded.append(name)
        elif (fitted := fit_positions(name, found, x)) is not None:
            found = fitted
            report.resized.append(entry)
        else:
            report.mismatched.append(entry)
            return x
        return jax.device_put(found, x.sharding)

    merged = jax.tree_util.tree_map_with_path(choose, params)
    report.unused.extend(given)
    return merged, report
