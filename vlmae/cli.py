"""The last line of every experiment file: `main(get_config)`."""

import dataclasses
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro
from jaxtyping import PyTree

from data_pipelines.pipeline import eval_data, train_batches
from data_pipelines.prepare import prepare
from data_pipelines.stored import open_source, tokenizer_for
from data_pipelines.tokenize import Tokenizer
from vlmae.config import ExperimentConfig
from vlmae.evaluate import evaluate
from vlmae.train import NonFiniteLoss, TooManyBadClips, train

GENERATED = ("shapes",)  # data sets that need no input, so they are made on first use

# What a user can mend: shown as one line. Anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, NonFiniteLoss, TooManyBadClips)


@dataclass(frozen=True)
class Command:
    """What the command line holds."""

    # Its fields stand at the top level: --model.video.mask.ratio, not --config.model...
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    workdir: Path | None = None
    """Config, metrics, checkpoints and results go here; None is runs/NAME."""


def main(get_config: Callable[[], ExperimentConfig]) -> None:
    """Trains and evaluates an experiment; every field of its config is a flag.

    An error that the user can mend (a bad field, missing data, another run's directory) ends with
    one line on stderr and exit code 1; its traceback goes to `error.txt` in the work directory.
    """
    try:
        command = tyro.cli(
            Command,
            default=Command(get_config()),
            description=sys.modules[get_config.__module__].__doc__,
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:  # get_config() itself made a config that the checks refuse
        sys.exit(f"error: {error}")
    workdir = command.workdir or Path("runs") / command.config.name
    try:
        run_experiment(command.config, workdir)
    except USER_ERRORS as error:
        if workdir.is_dir():
            (workdir / "error.txt").write_text(traceback.format_exc())
        sys.exit(f"error: {error}")


def run_experiment(config: ExperimentConfig, workdir: Path) -> dict[str, float]:
    """Prepares what can be generated, resolves the config, trains, and evaluates.

    Returns:
      The metrics of the final evaluation.
    """
    for source in (*config.data.train, config.data.eval):
        if source.name in GENERATED:
            prepare(source.name, config.data.data_dir)
    for source in config.data.train:
        open_source(source, config.data.data_dir)  # a missing split shows now, not after compiling
    tokenizer = tokenizer_for(config.data)
    config = with_vocabulary(config, tokenizer)
    data = eval_data(config.data)

    def evaluate_step(step: int, params: PyTree, mesh: jax.sharding.Mesh) -> dict[str, float]:
        return evaluate(config, params, mesh, data, workdir)

    def make_batches(start_step: int):
        tokenizer.save(workdir / "tokenizer")
        return train_batches(
            config.data,
            start_step,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

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
