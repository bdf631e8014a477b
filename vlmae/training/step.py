"""The training step: its state, its program for an experiment, and the shapes it takes."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.config import SourceConfig
from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ExperimentConfig, ObjectivesConfig
from vlmae.config.tree import override
from vlmae.models.attention import has_cudnn_attention
from vlmae.models.video_language import VideoLanguageModel, build_model, clamp_temperature
from vlmae.parallel.sharding import (
    batch_sharding,
    batch_shards,
    check_batch_size,
    check_heads,
    make_mesh,
    replicated,
    state_shardings,
)
from vlmae.training.gradients import Gradients, make_gradients
from vlmae.training.objectives import compute_losses
from vlmae.training.optim import OptimValues, global_norm, make_optimizer, optim_values


class TrainState(struct.PyTreeNode):
    """Everything that a step changes, and all that a checkpoint holds.

    Shapes and shardings of a state are trees of the same form. The seed never changes. It is an
    array here so that one compiled step serves all seeds.
    """

    seed: PyTree  # int32
    step: PyTree  # int32, steps done
    params: PyTree
    opt_state: PyTree

    @property
    def evaluated(self) -> PyTree:
        """Parameters that are evaluated and exported."""
        return self.params

    def starting_from(self, params: PyTree) -> "TrainState":
        """Replace the parameters of a new state."""
        return self.replace(params=params)


class AveragedState(TrainState):
    """State of a run that averages its parameters over the steps (`optim.ema_decay`).

    A class of its own, so that states and checkpoints without averages stay as they are.
    """

    ema: PyTree

    @property
    def evaluated(self) -> PyTree:
        """The averages."""
        return self.ema

    def starting_from(self, params: PyTree) -> TrainState:
        """Replace the parameters of a new state; their averages start from them."""
        # Copies: a step donates each buffer once.
        return self.replace(params=params, ema=jax.tree.map(jnp.copy, params))


class RunValues(NamedTuple):
    """Numbers of a run that its compiled step takes as inputs.

    Runs of the same shapes that differ in these alone, or in their seed, share one program.
    """

    optim: OptimValues
    weights: Mapping[str, PyTree]  # float32, of the objectives that are trained
    ema_decay: PyTree  # float32


def run_values(config: ExperimentConfig) -> RunValues:
    """Collect the numbers of an experiment, as NumPy scalars."""
    weights = {name: np.float32(weight) for name, weight in config.objectives.weights.items()}
    optim = config.optim
    return RunValues(optim_values(optim, config.train.steps), weights, np.float32(optim.ema_decay))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    gradients: Gradients,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, dict]:
    """Update the parameters once; all randomness is a function of the state's seed and step."""
    # A continued run draws what an unbroken one would: no generator state is saved.
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    grads, metrics = gradients(state.params, batch, key)
    # Clipping, decay and freezing are in the optimizer: the step itself knows none of them.
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = clamp_temperature(optax.apply_updates(state.params, updates))
    metrics = {**metrics, "optim/grad_norm": global_norm(grads)}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def average_params(
    state: AveragedState,
    batch: Batch,
    *,
    step: Callable[..., tuple[AveragedState, dict]],
    decay: Float[Array, ""],
) -> tuple[AveragedState, dict]:
    """Run a step, and take its result into the exponential moving averages of the parameters.

    The n-th step's decay is at most n / (9 + n), so that the averages soon forget where they began:
    the rule of `tf.train.ExponentialMovingAverage` with `num_updates`.
    """
    new, metrics = step(state, batch)
    done = state.step.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + done) / (10 + done))
    # Of the difference, so that what does not change (frozen) stays as it is, bit for bit.
    ema = jax.tree.map(lambda mean, x: mean + share * (x - mean), state.ema, new.params)
    return new.replace(ema=ema), metrics


def skip_nonfinite(
    state: TrainState, batch: Batch, *, step: Callable[..., tuple[TrainState, dict]]
) -> tuple[TrainState, dict]:
    """Run a step, but keep parameters and moments if its loss, gradient or result is not finite.

    `optim/skipped_ratio` is 1 then, else 0.
    """
    new, metrics = step(state, batch)
    # The gradient too: squared, a large one leaves infinite moments and finite parameters.
    values = metrics["loss/total"], metrics["optim/grad_norm"], global_norm(new.params)
    good = jnp.isfinite(jnp.stack(values)).all()

    def keep(new: Array, old: Array) -> Array:
        # Counts go on: they stand for the step, whose learning rate they give.
        return jnp.where(good, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    kept = jax.tree.map(keep, new, state)
    return kept, metrics | {"optim/skipped_ratio": 1.0 - good}


def make_step(config: ExperimentConfig, mesh: jax.sharding.Mesh, state: PyTree) -> Callable:
    """Jit the `train_step` of an experiment, sharded in and out, with the old state donated.

    Returns:
      A function (state, batch, `run_values`) -> new state and metrics.
    """
    model = build_model(config, deterministic=False, device=mesh.devices.flat[0])
    parts = config.optim.accumulate_steps
    groups = config.objectives.local_groups or batch_shards(mesh)
    shardings = state_shardings(state, mesh)

    def step(state: TrainState, batch: Batch, values: RunValues) -> tuple[TrainState, dict]:
        gradients = make_gradients(model, config.objectives, groups, parts, values.weights)

        def sharded_gradients(params: PyTree, batch: Batch, key: Array) -> tuple[PyTree, dict]:
            # As the parameters: left to itself, XLA cuts small gradients and the update of what
            # `tensor` does not shard, and joins them again by a permutation for each array.
            grads, metrics = gradients(params, batch, key)
            return jax.lax.with_sharding_constraint(grads, shardings.params), metrics

        tx = make_optimizer(config.optim, values.optim, config.model)
        update: Callable = functools.partial(train_step, gradients=sharded_gradients, tx=tx)
        if config.optim.ema_decay:
            update = functools.partial(average_params, step=update, decay=values.ema_decay)
        if config.train.max_skipped_steps:
            return skip_nonfinite(state, batch, step=update)
        return update(state, batch)

    # Donated, so that old and new state share their memory.
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def init_state(
    seed: Int[Array, ""],
    batch: Batch,
    *,
    model: VideoLanguageModel,
    tx: optax.GradientTransformation,
    objectives: ObjectivesConfig,
    averages: bool = False,
) -> TrainState:
    """Make a new state, to be jitted; only parts that the objectives use get parameters.

    With `averages` it holds those of the parameters too.
    """
    key = jax.random.key(seed)

    def run_objectives(model: VideoLanguageModel, batch: Batch) -> dict:
        return compute_losses(model, batch, key, objectives).metrics

    # Flax makes parameters only of methods that are called: a loss that is off leaves no head.
    params = model.init({"params": key, "dropout": key}, batch, method=run_objectives)["params"]
    step = jnp.zeros((), "int32")
    state = jnp.asarray(seed, "int32"), step, params, tx.init(params)
    return AveragedState(*state, params) if averages else TrainState(*state)


def make_init(config: ExperimentConfig) -> Callable[[Int[Array, ""]], TrainState]:
    """Make a function from a seed to a new training state; its shapes need no data."""
    full_size = override(config, {"data.train_size": 0})
    return functools.partial(
        init_state,
        # Two rows, the fewest for which VTM finds a negative; parameters depend on no size of the
        # batch.
        batch=jax.tree.map(jnp.zeros_like, abstract_batch(full_size, batch_size=2)),
        model=build_model(config),
        tx=make_optimizer(config.optim, run_values(config).optim, config.model),
        objectives=config.objectives,
        averages=config.optim.ema_decay > 0,
    )


@functools.lru_cache(maxsize=8)
def abstract_state(config: ExperimentConfig) -> TrainState:
    """Return the shapes of a new training state; traced once a config."""
    return jax.eval_shape(make_init(config), 0)


def sharded_init(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> Callable[[int], TrainState]:
    """Jit a function from a seed to a state that is sharded over the mesh."""
    # Made in shards by one program: a model may be larger than the memory of one device.
    return jax.jit(make_init(config), out_shardings=state_shardings(abstract_state(config), mesh))


def make_checked_mesh(config: ExperimentConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """Make the configured mesh, and check that it divides batches and attention heads.

    Args:
      config: the experiment.
      devices: that the mesh is made of; None: all.

    Raises:
      UserError: names the config field and the mesh axes, or what the devices lack.
    """
    # Checks that need devices are here; the config's own run on machines without any.
    mesh, data = make_mesh(config.mesh, devices), config.data
    device = mesh.devices.flat[0]
    if config.model.attention == "cudnn" and not has_cudnn_attention(device):
        raise UserError(
            "model.attention=cudnn needs a GPU of compute capability 8.0 or later, but jax finds "
            f"{device.platform} devices ({device.device_kind})"
        )
    parts = config.optim.accumulate_steps
    name = "data.batch_size" + (f" / optim.accumulate_steps={parts}" if parts > 1 else "")
    check_batch_size(data.batch_size // parts, mesh, name)
    check_batch_size(data.eval_batch_size, mesh, "data.eval_batch_size")
    # Of a micro-batch in one group: negatives of VTM come from there.
    groups = config.objectives.local_groups or batch_shards(mesh)
    rows, rest = divmod(data.batch_size // parts, groups)
    check(not rest, f"{name} cannot be cut into objectives.local_groups={groups}")
    if rows < config.objectives.min_rows:
        where = "in each group" if config.objectives.local_groups else "on each device"
        raise UserError(
            f"{name} leaves {rows} row {where}, so objectives.vtm_scope=local finds no "
            "negatives: use a larger batch or objectives.vtm_scope=global"
        )
    for part in ("video", "text"):
        check_heads(getattr(config.model, part).num_heads, mesh, f"model.{part}.num_heads")
    return mesh


def abstract_batch(
    config: ExperimentConfig, source: SourceConfig | None = None, batch_size: int | None = None
) -> Batch:
    """Build the shapes of a training batch, with all fields that the pipeline fills.

    Args:
      config: the experiment.
      source: the training source of the batch; None: the one with the most frames, which needs
        all parts of the model.
      batch_size: rows; None: as in the config.
    """
    data = config.data
    # The longest clips have all parts: images alone skip time and frame selection.
    source = source or max(data.train, key=lambda source: source.num_frames)
    rows = batch_size or data.batch_size
    size, length = data.frame_size, data.text_len
    fields = {
        "video": ((source.num_frames, size, size, 3), "uint8"),
        "text_ids": ((length,), "int32"),
        "text_mask": ((length,), "bool"),
        "media_ids": ((), "int32"),
        "valid": ((), "bool"),
    }
    if data.num_others:
        shape = (data.num_others, length)
        fields |= {"other_ids": (shape, "int32"), "other_mask": (shape, "bool")}
    if config.model.num_classes:
        fields["targets"] = ((config.model.num_classes,), "bool")
    if data.answer_len:
        shape = (data.answer_len,)
        fields |= {"answer_ids": (shape, "int32"), "answer_mask": (shape, "bool")}
    return Batch(
        **{
            name: jax.ShapeDtypeStruct((rows, *shape), dtype)
            for name, (shape, dtype) in fields.items()
        }
    )


def random_batch(shapes: Batch, vocab_size: int) -> Batch:
    """Fill a batch with random pixels and tokens; all rows valid, all media ids differ."""
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        return rng.integers(0, 256 if x.dtype == np.uint8 else vocab_size, x.shape, x.dtype)

    # Rows of one media id are no negatives of each other.
    media_ids = np.arange(len(shapes.valid), dtype=np.int32)
    return jax.tree.map(fill, shapes)._replace(media_ids=media_ids)
