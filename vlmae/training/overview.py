"""What a run will do, said before it begins."""

import jax

from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.storage.row_counts import Rows, count_rows
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.phases import segments
from vlmae.training.step import abstract_state

UNITS = {"captions": "captions", "labels": "labeled clips"}  # of rows, by task


def describe_run(config: ExperimentConfig) -> list[str]:
    """Return a line each for the training data, the evaluation data, the model and the steps.

    Args:
      config: the resolved experiment.

    Raises: as `open_source`.
    """
    data, train = config.data, config.train
    rows = [count_rows(source, data) for source in data.train]
    sources = ", ".join(_source(*pair, data) for pair in zip(data.train, rows, strict=True))
    held_out = count_rows(data.eval_source, data)
    epochs = train.steps * data.batch_size / max(1, sum(found.texts for found in rows))
    frames = {source.num_frames for source in data.train}
    programs = len({part.config for part in segments(config)}) * len(frames)
    lines = [
        f"training: {sources}",
        f"evaluation: {_source(data.eval_source, held_out, data)}",
        f"model: {_parameters(config)}",
        f"steps: {train.steps:,} of {data.batch_size} clips, {epochs:.3g} epochs; "
        f"{programs} training program{'s' * (programs > 1)} to compile",
    ]
    for source, found in zip(data.train, rows, strict=True):
        if found.clips < data.batch_size:
            lines.append(
                f"note: --data.batch-size={data.batch_size} is more than the {found.clips} clips "
                f"of {source.name}/{source.split}: a batch holds some of them several times"
            )
    return lines


def _source(source: SourceConfig, found: Rows, data: DataConfig) -> str:
    unit = UNITS.get(data.task, "questions")
    return f"{source.name}/{source.split}, {found.clips:,} clips, {found.texts:,} {unit}"


def _parameters(config: ExperimentConfig) -> str:
    """Describe the size of the model, and of its largest parts."""
    params = abstract_state(config).params
    sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in params.items()}
    largest = sorted(sizes, key=lambda part: -sizes[part])[:3]
    parts = ", ".join(f"{part} {sizes[part] / 1e6:.2f}" for part in largest)
    return f"{sum(sizes.values()) / 1e6:.2f} million parameters ({parts}, ...)"
