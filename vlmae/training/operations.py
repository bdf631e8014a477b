"""FLOPs of a run's training step: by part of the model (`vlmae operations RUN`), and saved."""

import functools
import math
from pathlib import Path

import jax
import optax
from jax.extend.core import ClosedJaxpr

from data_pipelines.schema.config import SourceConfig
from vlmae.config.experiment import ExperimentConfig, load_config
from vlmae.config.tree import override
from vlmae.models.video_language import build_model
from vlmae.runs.tables import markdown_table
from vlmae.training.gradients import make_gradients
from vlmae.training.step import abstract_batch, init_state
from vlmae.training.step_cost import count_flops, sum_flops


def trace_gradients(config: ExperimentConfig, num_frames: int) -> ClosedJaxpr:
    """Trace the gradients of an experiment's step on shapes, for clips of `num_frames` frames."""
    batch = abstract_batch(config, SourceConfig(num_frames=num_frames))
    init = functools.partial(
        init_state,
        model=build_model(config),
        # Parameters alone are wanted: an optimizer's state would only cost time.
        tx=optax.identity(),
        objectives=config.objectives,
    )
    params = jax.eval_shape(init, 0, batch).params
    model = build_model(config, deterministic=False)
    # One shard: counts are those of the whole batch, whatever the devices.
    gradients = make_gradients(model, config.objectives, 1, config.optim.accumulate_steps)
    return jax.make_jaxpr(gradients)(params, batch, jax.eval_shape(jax.random.key, 0))


def dense_twin(config: ExperimentConfig) -> ExperimentConfig:
    """Return the experiment with all patches, tokens and frames; hence without MVM."""
    changes = {
        "model.video.mask.scheme": "none",
        "model.video.mask.ratio": 0.0,
        "model.video.sparsify.keep_rate": 1.0,
        "model.video.sparsify.warmup_rates": (),
        "model.video.sparsify.warmup_steps": 0,
        "model.selector.kind": "none",
        "objectives.mvm": 0.0,
        "train.phases": (),
    }
    return override(config, changes)


def flops_per_clip(config: ExperimentConfig) -> float:
    """Count the FLOPs of a training step per clip, the mean over the sources by weight."""
    sources = config.data.train
    flops = [
        source.weight * sum_flops(count_flops(trace_gradients(config, source.num_frames))).total
        for source in sources
    ]
    return sum(flops) / sum(source.weight for source in sources) / config.data.batch_size


def describe_saving(config: ExperimentConfig, total_flops: float) -> str:
    """Say in a line how many operations a run needed, and how many its dense twin would have.

    Args:
      config: the experiment.
      total_flops: of the run.

    Returns:
      The line; empty for a dense experiment, or if the total is not known.
    """
    twin = dense_twin(config)
    if math.isnan(total_flops) or twin == config:  # tracing takes seconds
        return ""
    dense = flops_per_clip(twin) * config.data.batch_size * config.train.steps
    if dense <= total_flops:
        return ""
    return (
        f"training took {total_flops / 1e12:.2f} x 10^12 operations; as many steps with all "
        f"patches, tokens and frames: {dense / 1e12:.2f}, {dense / total_flops:.1f} times that"
    )


def show(directory: Path) -> None:
    """Print the FLOPs of a run's training step for every length of its training clips.

    Args:
      directory: the run's work directory.
    """
    config = load_config(directory / "config.json")
    for num_frames in sorted({source.num_frames for source in config.data.train}):
        print(f"A clip of {num_frames} frames:\n")
        parts = count_flops(trace_gradients(config, num_frames))
        rows = [["part", "forward", "backward", "recomputed", "million FLOPs a clip"]]
        for name, flops in (parts | {"total": sum_flops(parts)}).items():
            counts = (*flops, flops.total)
            rows.append([name, *(f"{x / config.data.batch_size / 1e6:,.2f}" for x in counts)])
        print(markdown_table(rows) + "\n")
