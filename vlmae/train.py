"""The training step, pure, and the loop around it, visible from start to end."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from data_pipelines.records import Batch
from vlmae.analysis.operations import operations_per_clip
from vlmae.checkpoint import Checkpoints
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override
from vlmae.example_batch import abstract_batch
from vlmae.gradients import Gradients, make_gradients
from vlmae.heartbeat import Heartbeat
from vlmae.initial import initial_params
from vlmae.metric_writer import MetricWriter, Muted, Progress
from vlmae.models.video_language import build_model
from vlmae.optim import global_norm, make_optimizer, make_schedule
from vlmae.preemption import Preempted, PreemptionNotice
from vlmae.processes import is_first, print_first
from vlmae.sharding import (
    batch_sharding,
    batch_shards,
    check_batch_size,
    check_heads,
    make_mesh,
    process_part,
    put_batch,
    replicated,
    state_shardings,
)
from vlmae.sparsify import keep_rate_at
from vlmae.speed import CompiledStep, Meter, matrix_rate_share, measure_matrix_rate
from vlmae.state import TrainState, init_state
from vlmae.trace import Trace, TracedStep
from vlmae.wandb_log import open_log
from vlmae.workdir import check_workdir, claim_workdir

BAD_CLIPS_JUDGED_AFTER = 1000  # clips seen before the share of bad ones may stop a run


class NonFiniteLoss(FloatingPointError):
    """A loss or the gradient is NaN or infinite."""


class TooManyBadClips(RuntimeError):
    """More clips than the config allows could not be decoded."""


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    gradients: Gradients,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, dict]:
    """One update. All randomness is a function of the state's seed and step."""
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    grads, metrics = gradients(state.params, batch, key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {**metrics, "optim/grad_norm": global_norm(grads)}
    return TrainState(state.seed, state.step + 1, params, opt_state), metrics


def make_step(config: ExperimentConfig, mesh: jax.sharding.Mesh, state: PyTree) -> Callable:
    """`train_step` of an experiment, jitted: sharded in and out, with the old state donated."""
    model = build_model(config, deterministic=False)
    parts = config.optim.accumulate_steps
    step = functools.partial(
        train_step,
        gradients=make_gradients(model, config.objectives, batch_shards(mesh), parts),
        tx=make_optimizer(config.optim, config.train.steps, config.model),
    )
    shardings = state_shardings(state, mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def make_steps(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, state: PyTree, notify: Callable
) -> dict[float, CompiledStep]:
    """A step for every keep rate of the schedule; each is compiled when it is first needed."""
    configs = {rate: at_keep_rate(config, rate) for rate in keep_rates(config)}
    return {
        rate: CompiledStep(
            make_step(at_rate, mesh, state),
            functools.partial(operations_per_clip, at_rate),
            notify,
        )
        for rate, at_rate in configs.items()
    }


def make_init(config: ExperimentConfig) -> Callable[[Int[Array, ""]], TrainState]:
    """A function from a seed to a new training state."""
    return functools.partial(
        init_state,
        batch=jax.tree.map(jnp.zeros_like, abstract_batch(config, batch_size=2)),
        model=build_model(config),
        tx=make_optimizer(config.optim, config.train.steps, config.model),
        objectives=config.objectives,
    )


def start_state(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, str]:
    """The run's own last checkpoint, or a new state from the seed and `train.init_from` or `init`.

    Returns:
      The state, and what was loaded into it; nothing where it is new or the run goes on.

    Raises:
      ValueError: the checkpoint has other shapes, or lies beyond the last step; see also
        `initial_params`.
    """
    init = make_init(config)
    abstract = jax.eval_shape(init, 0)
    shardings = state_shardings(abstract, mesh)
    step = checkpoints.latest_step()
    if step is not None:
        if step > config.train.steps:
            raise ValueError(
                f"the checkpoint is at step {step}, beyond train.steps={config.train.steps}"
            )
        print_first(f"continuing from step {step}")
        place = functools.partial(jax.tree.map, _with_sharding)
        return checkpoints.restore(step, place(abstract, shardings)), ""
    state = jax.jit(init, out_shardings=shardings)(config.seed)
    params, report = initial_params(config, state.params)
    if report:
        print_first(report)
    return state.replace(params=params), report


def _with_sharding(x: jax.ShapeDtypeStruct, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def check_metrics(step: int, metrics: dict[str, float]) -> None:
    """Raises NonFiniteLoss with the step and the names of what is not finite."""
    bad = [
        f"{name}={value}"
        for name, value in metrics.items()
        if name.startswith(("loss/", "optim/")) and not math.isfinite(value)
    ]
    if bad:
        raise NonFiniteLoss(f"step {step}: not finite: {', '.join(bad)}")


def check_bad_clips(bad: int, seen: int, total: int, max_ratio: float) -> None:
    """Raises TooManyBadClips once enough of all `total` clips were seen to judge their share."""
    if seen >= min(BAD_CLIPS_JUDGED_AFTER, total) and bad > max_ratio * seen:
        raise TooManyBadClips(
            f"{bad} of {seen} clips could not be decoded, more than "
            f"data.max_bad_ratio={max_ratio} allows (each is named above)"
        )


def train(
    config: ExperimentConfig,
    workdir: Path,
    make_batches: Callable[[int, int, int], Iterator[Batch]],
    evaluate: Callable[[PyTree, jax.sharding.Mesh, Callable], dict[str, float]],
    profile: bool = False,
) -> dict[str, float]:
    """Trains to `train.steps`, going on from the work directory's last checkpoint.

    Of several processes all must call this; the first one prints, and writes all but checkpoints.

    Args:
      config: the resolved experiment.
      workdir: where config, metrics and checkpoints are written; the same for all processes.
      make_batches: (start step, part, parts) -> this part of the rows of the batches from that
        step on.
      evaluate: (parameters, mesh, on_progress) -> metrics; calls on_progress() now and then.
      profile: write a trace of a few steps of the first process to `profile` in there.

    Returns:
      The metrics of the final evaluation.

    Raises:
      ValueError: see `check_workdir`, `start_state` and the checks of the mesh.
      NonFiniteLoss, TooManyBadClips: the run stopped; the last good checkpoint is intact.
      Preempted: the process was told to end, and has saved the step it was at.
    """
    mesh = make_checked_mesh(config)
    check_workdir(config, workdir)
    matrix_rate = measure_matrix_rate(config.model.dtype)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        # First in, last out: it watches the last save too.
        heart = stack.enter_context(Heartbeat(workdir, config.train.max_idle_secs))
        checkpoints = stack.enter_context(Checkpoints(workdir, config.train.keep_checkpoints))
        state, loaded = start_state(config, mesh, checkpoints)
        start, last = int(state.step), config.train.steps
        if is_first():
            claim_workdir(config, workdir, loaded)
        notice = stack.enter_context(PreemptionNotice())
        writer = MetricWriter(workdir, start, open_log(config, workdir)) if is_first() else Muted()
        progress = Progress(start, last) if is_first() else Muted()
        stack.enter_context(contextlib.closing(writer))
        stack.enter_context(contextlib.closing(progress))
        batches = stack.enter_context(contextlib.closing(make_batches(start, *process_part(mesh))))
        steps = make_steps(config, mesh, state, progress.print)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        schedule = jax.jit(make_schedule(config.optim, last))
        param_norm = jax.jit(global_norm)
        jax.block_until_ready((schedule(start), param_norm(state.params)))  # compiles them
        meter, bad_clips, pending = Meter(), 0, {}
        if profile and is_first():
            trace = stack.enter_context(Trace(workdir / "profile", progress.print, meter.paused))
            steps = {rate: TracedStep(step, trace) for rate, step in steps.items()}
            evaluate = trace.around(evaluate)

        for step in range(start + 1, last + 1):
            heart.enter("waiting for data", step)
            with meter.waiting():
                batch = put_batch(next(batches), mesh)
            run_step = steps[keep_rate_before(config, step)]
            heart.enter("compiling", step)
            with meter.paused():
                run_step.compile(state, batch)
            heart.enter("training", step)
            state, metrics = run_step(state, batch)
            if on_cpu:  # simulated devices may deadlock when several steps are under way
                jax.block_until_ready(metrics)

            preempted = notice.agreed(step) and step != last
            due = {
                "log": step % config.train.log_every_steps == 0 or step == last or preempted,
                "save": step % config.train.save_every_steps == 0 or step == last or preempted,
                "evaluate": is_due(step, config.train.eval_every_steps) and step != last,
            }
            # Metrics are read one step late, so that the device never waits for the host;
            # nothing is saved before its own step is known to be finite.
            pending[step] = metrics
            for settled in sorted(pending) if any(due.values()) else sorted(pending)[:-1]:
                values = jax.tree.map(float, jax.device_get(pending.pop(settled)))
                check_metrics(settled, values)
                bad_clips += round(values["data/bad_ratio"] * config.data.batch_size)
                meter.add(values, clips=config.data.batch_size)
            seen = (step - start) * config.data.batch_size
            total = last * config.data.batch_size
            check_bad_clips(bad_clips, seen, total, config.data.max_bad_ratio)

            if any(due.values()):
                # Read only here, a pass over all parameters. A finite loss does not mean that its
                # own update is finite, and nothing else is saved.
                norm = {"optim/param_norm": float(param_norm(state.params))}
                check_metrics(step, norm)
            if due["log"]:
                report = meter.report() | norm | {"optim/learning_rate": float(schedule(step - 1))}
                report["speed/matrix_rate_share"] = matrix_rate_share(report, matrix_rate)
                writer.write(step, report)
                progress.report(step, report)
            if due["evaluate"]:
                with meter.paused():
                    writer.write(
                        step, evaluate(state.params, mesh, heart.within("evaluating", step))
                    )
            if due["save"]:  # last: what a continued run does not do again is on record
                heart.enter("saving", step)
                checkpoints.save(step, state)
            if preempted:
                progress.print(f"told to end: saving step {step}; the same command goes on from it")
                raise Preempted
            progress.advance()

        result = evaluate(state.params, mesh, heart.within("evaluating", last))
        writer.write(last, result)
    return result


def keep_rates(config: ExperimentConfig) -> set[float]:
    """Every keep rate of the schedule of `model.video.sparsify`; one program each."""
    sparsify = config.model.video.sparsify
    return {*sparsify.warmup_rates, sparsify.keep_rate}


def keep_rate_before(config: ExperimentConfig, step: int) -> float:
    """The keep rate of the update that makes `step` out of `step` - 1."""
    sparsify = config.model.video.sparsify
    return keep_rate_at(step - 1, sparsify.keep_rate, sparsify.warmup_rates, sparsify.warmup_steps)


def at_keep_rate(config: ExperimentConfig, rate: float) -> ExperimentConfig:
    """The config with this keep rate in training."""
    return override(config, {"model.video.sparsify.keep_rate": rate})


def is_due(step: int, every_steps: int) -> bool:
    """True at multiples of `every_steps`; never if it is 0."""
    return every_steps > 0 and step % every_steps == 0


def make_checked_mesh(config: ExperimentConfig) -> jax.sharding.Mesh:
    """The configured mesh, after checking that it divides batches and attention heads.

    Raises:
      ValueError: names the config field and the mesh axes, or devices that lack what is asked for.
    """
    mesh, data = make_mesh(config.mesh), config.data
    if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(
            f"model.attention=cudnn needs a GPU, but jax finds {jax.default_backend()} devices"
        )
    parts = config.optim.accumulate_steps
    name = "data.batch_size" + (f" / optim.accumulate_steps={parts}" if parts > 1 else "")
    check_batch_size(data.batch_size // parts, mesh, name)
    check_batch_size(data.eval_batch_size, mesh, "data.eval_batch_size")
    rows = data.batch_size // parts // batch_shards(mesh)
    if config.objectives.vtm and config.objectives.vtm_scope == "local" and rows < 2:
        raise ValueError(
            f"{name} leaves {rows} row on each device, so objectives.vtm_scope=local finds no "
            "negatives: use a larger batch or objectives.vtm_scope=global"
        )
    for part in ("video", "text"):
        check_heads(getattr(config.model, part).num_heads, mesh, f"model.{part}.num_heads")
    return mesh
