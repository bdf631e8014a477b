"""The last line of every experiment file: `main(get_config)`."""

import dataclasses
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
from jaxtyping import PyTree

from data_pipelines.pipeline import eval_data, tokenizer_for, train_batches
from data_pipelines.prepare import prepare
from data_pipelines.tokenize import Tokenizer
from vlmae.config import ExperimentConfig
from vlmae.evaluate import evaluate
from vlmae.train import NonFiniteLoss, TooManyBadClips, train

GENERATED = ("shapes",)  # data sets that need no input, so they are made on first use

# What a user can mend: shown as one line. Anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, NonFiniteLoss, TooManyBadClips)


def main(get_config: Callable[[], ExperimentConfig]) -> None:
    """Trains and evaluates an experiment; every field of its config is a flag.

    An error that the user can mend (a bad field, missing data, another run's directory) ends with
    one line on stderr and exit code 1; its traceback goes to `error.txt` in the work directory.
    """
    import tyro

    def run(config: ExperimentConfig, workdir: Path | None = None) -> None:
        workdir = workdir or Path("runs") / config.name
        try:
            run_experiment(config, workdir)
        except USER_ERRORS as error:
            if workdir.is_dir():
                (workdir / "error.txt").write_text(traceback.format_exc())
            sys.exit(f"error: {error}")

    try:
        config = get_config()
        # The fields stand at the top level: --model.video.mask.ratio, not --config.model...
        run.__annotations__["config"] = Annotated[ExperimentConfig, tyro.conf.arg(name="")]
        run.__defaults__ = (config, None)
        run.__doc__ = f"""{sys.modules[get_config.__module__].__doc__ or ""}

        Args:
          config: the experiment.
          workdir: Config, metrics, checkpoints and results go here; default runs/NAME.
        """
        tyro.cli(run, config=(tyro.conf.AvoidSubcommands,))
    except ValueError as error:  # raised by the checks of the config itself
        sys.exit(f"error: {error}")


def run_experiment(config: ExperimentConfig, workdir: Path) -> dict[str, float]:
    """Prepares what can be generated, resolves the config, trains, and evaluates.

    Returns:
      The metrics of the final evaluation.
    """
    for source in (*config.data.train, config.data.eval):
        if source.name in GENERATED:
            prepare(source.name, config.data.data_dir)
    tokenizer = tokenizer_for(config.data)
    config = with_vocabulary(config, tokenizer)
    data = eval_data(config.data)

    def evaluate_step(step: int, params: PyTree, mesh: jax.sharding.Mesh) -> dict[str, float]:
        return evaluate(config, params, mesh, data, workdir)

    def make_batches(start_step: int):
        tokenizer.save(workdir / "tokenizer")
        return train_batches(config.data, start_step, seed=config.seed)

    result = train(config, workdir, make_batches, evaluate_step)
    if config.objectives.vtc:
        print((workdir / "retrieval.md").read_text())
    print(f"results, metrics and pictures are in {workdir}")
    return result


def with_vocabulary(config: ExperimentConfig, tokenizer: Tokenizer) -> ExperimentConfig:
    """Takes vocabulary size and special ids from the tokenizer.

    Raises:
      ValueError: the config asks for a vocabulary that is too small for the tokenizer.
    """
    wanted, size = config.model.text.vocab_size, tokenizer.vocab_size
    if wanted and wanted < size:
        raise ValueError(f"model.text.vocab_size={wanted}, but the tokenizer has {size} words")
    text = dataclasses.replace(
        config.model.text,
        vocab_size=wanted or size,
        cls_id=tokenizer.cls_id,
        mask_id=tokenizer.mask_id,
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
