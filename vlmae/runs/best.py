"""Best checkpoint of a run by a metric of its evaluations: the record of it, and when to stop.

`best.json` holds the value of each evaluation. The best step is derived from it, among those whose
checkpoints are there, so a run that was killed between the two files loses nothing.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxtyping import PyTree

from data_pipelines.schema.checks import MissingError, UserError, check
from data_pipelines.schema.json_files import read_record
from vlmae.runs.atomic_files import write_json
from vlmae.runs.checkpoint import Checkpoints, load_params
from vlmae.runs.load import holds_tensors
from vlmae.runs.metric_registry import metric_of

BEST = "best.json"


@dataclass(frozen=True)
class BestRecord:
    """Values of one metric, in order of evaluation."""

    metric: str
    steps: tuple[int, ...] = ()
    values: tuple[float | None, ...] = ()  # None: the metric was no number

    def up_to(self, step: int) -> "BestRecord":
        """Leave out evaluations after a step, which a run that goes back does again."""
        count = sum(other <= step for other in self.steps)
        return replace(self, steps=self.steps[:count], values=self.values[:count])

    def added(self, step: int, value: float) -> "BestRecord":
        """Add an evaluation; it replaces an earlier one of the same step."""
        before, kept = self.up_to(step - 1), None if math.isnan(value) else value
        return replace(before, steps=(*before.steps, step), values=(*before.values, kept))

    def best_step(self, among: Collection[int] | None = None) -> int | None:
        """Return the step of the best value, the first of equal ones; None if there is none.

        Args:
          among: steps that count; None: all.
        """
        sign = -1 if metric_of(self.metric).better == "lower" else 1
        rated = {
            step: sign * value
            for step, value in zip(self.steps, self.values, strict=True)
            if value is not None and (among is None or step in among)
        }
        return max(rated, key=lambda step: rated[step]) if rated else None

    def waited(self) -> int:
        """Count the evaluations since the best one."""
        best = self.best_step()
        return len(self.steps) if best is None else sum(step > best for step in self.steps)


def read_best(workdir: Path) -> BestRecord:
    """Read `best.json` of a run.

    Raises:
      MissingError: the run keeps no best checkpoint.
      UserError: the file is damaged; names it.
    """
    path = workdir / BEST
    if not path.is_file():
        raise MissingError(
            f"{workdir} has no best checkpoint: it was trained without --train.best-metric"
        )
    record = read_record(BestRecord, path)
    if len(record.steps) != len(record.values):
        raise UserError(f"{path}: steps and values must be equally many")
    return record


class BestKeeper:
    """Keeps the best checkpoint of a run that goes on, and says when to stop.

    Without a metric it does nothing.
    """

    def __init__(self, metric: str, patience: int, workdir: Path, checkpoints: Checkpoints):
        """Keep `checkpoints` from deleting the best of those that are there."""
        self.metric, self.patience = metric, patience
        self.workdir, self.checkpoints = workdir, checkpoints
        self.record = BestRecord(metric)

    def go_on_from(self, start: int) -> None:
        """Read the record of the steps up to `start`, if it is of the same metric.

        Raises:
          UserError: see `read_best`.
        """
        if self.metric and (self.workdir / BEST).is_file():
            found = read_best(self.workdir)
            if found.metric == self.metric:
                self.record = found.up_to(start)
                self.checkpoints.best = self.step()

    def step(self) -> int | None:
        """Return the step of the best checkpoint that is there."""
        return self.record.best_step(self.checkpoints.all_steps())

    def add(self, step: int, metrics: Mapping[str, float], write: bool) -> bool:
        """Take the metrics of an evaluation; True if this step is the best, and is to be saved.

        Args:
          step: that was evaluated.
          metrics: of the evaluation.
          write: False in all processes but one.

        Raises:
          UserError: the evaluation has no such metric; lists those it has.
        """
        if not self.metric:
            return False
        if self.metric not in metrics:
            known = ", ".join(sorted(metrics)) or "none"
            raise UserError(f"--train.best-metric={self.metric}: the evaluation has {known}")
        self.record = self.record.added(step, float(metrics[self.metric]))
        is_best = self.record.best_step([*self.checkpoints.all_steps(), step]) == step
        if is_best:
            self.checkpoints.best = step
        if write:
            write_json(self.workdir / BEST, asdict(self.record))
        return is_best

    def stops(self) -> bool:
        """Return True if the last `patience` evaluations brought nothing better."""
        return 0 < self.patience <= self.record.waited()


CHOICES = "newest, best or the number of a step"


def load_chosen(workdir: Path, checkpoint: str = "newest") -> tuple[PyTree, int]:
    """Read parameters and step of the checkpoint that `--checkpoint` names.

    Args:
      workdir: a run, or an export of one, which holds a single checkpoint.
      checkpoint: "newest", "best", or the number of a step.

    Raises:
      MissingError, UserError: see `load_params` and `read_best`; or the word is another.
    """
    if checkpoint == "newest":
        return load_params(workdir)
    is_known = checkpoint == "best" or checkpoint.isdecimal()
    check(is_known, f"--checkpoint {checkpoint}: must be {CHOICES}")
    check(not holds_tensors(workdir), f"{workdir} is an export: it holds one checkpoint alone")
    if checkpoint != "best":
        return load_params(workdir, int(checkpoint))
    return load_params(workdir, best_step(workdir))


def best_step(workdir: Path) -> int:
    """Return the step of a run's best checkpoint.

    Raises:
      MissingError: it has none; see also `read_best`.
    """
    record = read_best(workdir)
    with Checkpoints(workdir) as checkpoints:
        step = record.best_step(checkpoints.all_steps())
    if step is None:
        raise MissingError(f"{workdir} holds no checkpoint of those in {BEST}")
    return step


def result_step(workdir: Path, metric: str, last: int) -> int:
    """Return the step that a run's result is of: the best one by `metric`, or else the last one.

    Args:
      workdir: the run.
      metric: its `train.best_metric`; empty: it keeps no best checkpoint.
      last: its last step, which counts if the metric was never a number.
    """
    try:
        return best_step(workdir) if metric else last
    except MissingError:
        return last


def check_metric(metric: str, evaluators: Collection[str]) -> None:
    """Check that `train.best_metric` is one that a run's evaluations have.

    Args:
      metric: the name; empty: nothing to check.
      evaluators: names of those that run.

    Raises:
      UserError: it is unknown, no evaluator gives it, or neither high nor low is better.
    """
    if metric:
        check(
            metric.partition("/")[0] in evaluators,
            f"--train.best-metric={metric}: must begin with {' or '.join(evaluators) or 'nothing'}"
            "/, the evaluations of this run",
        )
        check(
            metric_of(metric).better != "neither",
            f"--train.best-metric={metric}: neither high nor low values of it are better",
        )
