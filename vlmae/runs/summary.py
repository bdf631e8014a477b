"""Work directories as records: differing config fields, state, metrics and cost."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from data_pipelines.schema.checks import UserError
from vlmae.config.experiment import ExperimentConfig, load_config
from vlmae.config.tree import flatten
from vlmae.runs.metric_writer import read_metrics
from vlmae.runs.newest import NewestMetrics
from vlmae.runs.result import (
    Cost,
    last_error,
    last_values,
    read_result,
    training_cost,
)

# Fields, or prefixes of fields, that change neither the parameters nor the cost of a step.
IGNORED = (
    "name",
    "data.data_dir",
    "train.log_every_steps",
    "train.eval_every_",
    "train.save_every_",
    "train.max_skipped_steps",
    "train.max_rollbacks",
    "train.keep_checkpoints",
    "train.max_idle_secs",
    "train.wandb_project",
    "objectives.mcm_template_ids",
)
# Folders inside of a work directory, which hold no other runs but many files.
NOT_ENTERED = (
    *("checkpoints", "set_aside", "tensorboard", "tokenizer", "jobs", "processes", "owner"),
    "wandb",
)
COMPLETE, UNFINISHED, FAILED = "complete", "unfinished", "failed"
DAMAGED = "damaged"  # a file of the run cannot be read


@dataclass(frozen=True)
class Run:
    """One work directory in any state."""

    name: str
    """Path relative to the reported folder."""
    title: str
    """`name` of the config; empty like `fields`."""
    fields: dict[str, Any]
    """Config by dotted names, without IGNORED; empty if the run failed before it had one."""
    state: str
    """COMPLETE, UNFINISHED, FAILED or DAMAGED."""
    error: str
    """Last line of a failed run's error; of a damaged run, the file and what is wrong with it."""
    step: int
    steps: int
    """Steps that were logged as done, and steps that the config asks for."""
    metrics: dict[str, float]
    """Newest value of each metric; that of the last step if the run is complete."""
    cost: Cost


@dataclass(frozen=True)
class Group:
    """Complete runs that are equal except for the seed."""

    fields: dict[str, Any]
    """Values of the fields that differ between groups."""
    runs: tuple[Run, ...]

    def mean_std(self, column: str) -> tuple[float, float]:
        """Compute mean and sample standard deviation (ddof = 1; NaN for one run) of a column."""
        return mean_std([value_of(run, column) for run in self.runs])


def find_runs(root: Path) -> list[Run]:
    """Find all work directories at and below a folder, sorted by path.

    A work directory has a `config.json`, or the `error.txt` of a run that did not get that far.

    Raises:
      UserError: no such folder, or no run in it.
    """
    found = [read_run(folder, root) for folder in find_workdirs(root, {"config.json", "error.txt"})]
    return sorted(found, key=lambda run: run.name)


def find_workdirs(root: Path, marks: set[str]) -> list[Path]:
    """Find the folders at and below `root` that have a file or folder of one of these names.

    Raises:
      UserError: no such folder, or no run in it.
    """
    if not root.is_dir():
        raise UserError(f"no such directory: {root}")
    found = []
    for folder, children, files in os.walk(root):
        if marks & {*files, *children}:
            found.append(Path(folder))
        children[:] = set(children) - set(NOT_ENTERED)  # `os.walk` enters what is left
    if not found:
        raise UserError(f"no run (a folder with config.json) in or below {root}")
    return sorted(found)


class RunFiles:
    """Files of a run that are read again and again; what has not changed is remembered."""

    def __init__(self, workdir: Path):
        """Read nothing yet."""
        self.workdir, self.newest = workdir, NewestMetrics(workdir)
        self._read: dict[str, tuple] = {}

    def config(self) -> tuple[ExperimentConfig, dict[str, Any]] | None:
        """Read the config, and its fields without IGNORED; None without a file.

        Raises:
          UserError: see `load_config`.
        """
        return self._unless_same("config.json", self._load_config)

    def result(self) -> dict | None:
        """Read the result, see `read_result`; a damaged one is an error."""
        return self._unless_same("result.json", lambda _: read_result(self.workdir))

    def _load_config(self, path: Path) -> tuple[ExperimentConfig, dict[str, Any]]:
        config = load_config(path)
        return config, {k: v for k, v in flatten(config).items() if not k.startswith(IGNORED)}

    def _unless_same(self, name: str, load: Callable[[Path], Any]) -> Any:
        # A result counts for one config alone, so each file is read anew if either has changed.
        stats = [_stat(self.workdir / other) for other in ("config.json", "result.json")]
        path = self.workdir / name
        if self._read.get(name, (None,))[0] != stats:
            self._read[name] = (stats, load(path) if path.exists() else None)
        return self._read[name][1]


def _stat(path: Path) -> tuple[int, int, int] | None:
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_run(
    workdir: Path, root: Path, files: RunFiles | None = None, with_cost: bool = True
) -> Run:
    """Read one work directory, in whatever state a kill or a damaged file has left it.

    Args:
      workdir: of the run.
      root: the folder that the name is relative to.
      files: the run's, where they have been read before.
      with_cost: compute the cost of a run that is not complete, from all of its lines.
    """
    name = run_name(workdir, root)
    try:
        return _read_run(workdir, name, files or RunFiles(workdir), with_cost)
    except UserError as error:  # it must not hide the other runs of a sweep
        nothing = training_cost([], 1)
        return Run(name, "", {}, DAMAGED, str(error), 0, 0, metrics={}, cost=nothing)


def run_name(workdir: Path, root: Path) -> str:
    """Name a run by its path relative to a folder above, or by its own folder."""
    return str(workdir.relative_to(root)) if workdir != root else workdir.resolve().name


def _read_run(workdir: Path, name: str, files: RunFiles, with_cost: bool) -> Run:
    (last, metrics), error, found = files.newest.read(), last_error(workdir), files.config()
    if found is None:
        nothing = training_cost([], 1)
        return Run(name, "", {}, FAILED, error, last, 0, metrics=metrics, cost=nothing)
    config, fields = found
    result = files.result()
    state = COMPLETE if result else FAILED if error else UNFINISHED
    lines = read_metrics(workdir) if with_cost and not result else []
    return Run(
        name=name,
        title=config.name,
        fields=fields,
        state=state,
        error=error if state == FAILED else "",
        step=result["step"] if result else last,
        steps=config.train.steps,
        metrics=metrics | last_values([result["metrics"]]) if result else metrics,
        cost=Cost(**result["cost"]) if result else training_cost(lines, config.data.batch_size),
    )


def differing_fields(runs: Sequence[Run]) -> list[str]:
    """List the fields whose values differ between runs that have a config, in config order."""
    configs = [run.fields for run in runs if run.fields]
    names = dict.fromkeys(name for fields in configs for name in fields)
    return [n for n in names if len({json.dumps(c.get(n)) for c in configs}) > 1]


def group_by_seed(runs: Iterable[Run]) -> list[Group]:
    """Group complete runs by all differing fields but the seed, sorted by their values."""
    complete = [run for run in runs if run.state == COMPLETE]
    fields = [field for field in differing_fields(complete) if field != "seed"]
    groups: dict[tuple, list[Run]] = {}
    for run in complete:
        groups.setdefault(tuple(run.fields.get(field) for field in fields), []).append(run)
    order = sorted(groups, key=lambda key: [_sort_key(value) for value in key])
    return [Group(dict(zip(fields, key, strict=True)), tuple(groups[key])) for key in order]


def _sort_key(value: Any) -> tuple:
    # Numbers by value, before everything else by its text: a field may hold both.
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def value_of(run: Run, column: str) -> float:
    """Return a metric ("retrieval/t2v_r1") or a cost ("secs_per_clip"); NaN if it is missing."""
    if column in Cost._fields:
        return getattr(run.cost, column)
    return run.metrics.get(column, math.nan)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Compute mean and sample standard deviation (ddof = 1; NaN for one value).

    >>> mean_std([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), std


def pareto_front(
    cost: Float[np.ndarray, " n"], quality: Float[np.ndarray, " n"]
) -> Int[np.ndarray, " p"]:
    """Return the indices of the Pareto front, by rising cost.

    A point is dominated by one that is at least as good and as cheap, and better in one of the two;
    equal points stay together. A point with a NaN is never on the front.
    """
    known = np.flatnonzero(~np.isnan(cost) & ~np.isnan(quality))
    order = known[np.lexsort((-quality[known], cost[known]))]
    best_before = -np.inf
    front: list[int] = []
    for i in order:
        equal_to_last = front and (cost[i], quality[i]) == (cost[front[-1]], quality[front[-1]])
        if quality[i] > best_before or equal_to_last:
            front.append(i)
            best_before = quality[i]
    return np.array(front, dtype=int)
