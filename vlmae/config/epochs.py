"""Lengths that are given in epochs, or as shares of a run, as steps."""

from collections.abc import Collection, Mapping
from typing import Any

from data_pipelines.schema.checks import check
from data_pipelines.schema.fields import flag
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import flatten, override

# Length in steps -> the field that takes its place where it is not 0.
TAKES_PLACE = {
    "train.steps": "train.epochs",
    "train.eval_every_steps": "train.eval_every_epochs",
    "train.save_every_steps": "train.save_every_epochs",
    "optim.warmup_steps": "optim.warmup_share",
}


def overruled(given: Collection[str]) -> dict[str, float]:
    """Return the changes by which lengths that are given in steps count, whatever the epochs.

    Args:
      given: names of fields.

    Raises:
      UserError: a length is given both ways.
    """
    found = {steps: relative for steps, relative in TAKES_PLACE.items() if steps in given}
    for steps, relative in found.items():
        twice = f"{flag(steps)} and {flag(relative)} say the same: give one of them"
        check(relative not in given, twice)
    return dict.fromkeys(found.values(), 0.0)


def change(config: ExperimentConfig, changes: Mapping[str, Any]) -> ExperimentConfig:
    """Override fields as a user means it, see `overruled`.

    Raises:
      UserError: a length is given both ways; or as `override`.
    """
    given = [field for field, value in changes.items() if value or field in TAKES_PLACE]
    return override(config, overruled(given) | dict(changes))


def has_epochs(config: ExperimentConfig) -> bool:
    """Return True if a length follows from the size of the data, or is a share of the run."""
    given = flatten(config)
    return any(given[relative] for relative in TAKES_PLACE.values())


def in_steps(config: ExperimentConfig, rows: int) -> ExperimentConfig:
    """Fill in the lengths in steps that follow from an epoch of so many rows.

    Raises:
      UserError: the result is refused, say as the warm-up is longer than the run.
    """
    given, epoch = flatten(config), rows / config.data.batch_size
    lengths = {
        steps: given[relative] * epoch
        for steps, relative in TAKES_PLACE.items()
        if given[relative] and steps != "optim.warmup_steps"
    }
    whole = {name: max(1, round(length)) for name, length in lengths.items()}
    if config.optim.warmup_share:
        steps = whole.get("train.steps", config.train.steps)
        whole["optim.warmup_steps"] = int(config.optim.warmup_share * steps)
    return override(config, whole) if whole else config
