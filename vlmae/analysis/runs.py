"""Work directories as rows of a table: what differs, how it ended, what it cost."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vlmae.config import load_config
from vlmae.config_tree import flatten
from vlmae.metric_writer import read_metrics
from vlmae.result import (
    Cost,
    last_error,
    last_step,
    last_values,
    read_result,
    training_cost,
)

# Fields, or what they begin with, that change neither what a run learns nor what a step costs.
IGNORED = (
    "name",
    "data.data_dir",
    "train.log_every_steps",
    "train.eval_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.max_idle_secs",
    "train.wandb_project",
    "objectives.mcm_template_ids",
)
# Folders inside of a work directory.
NOT_ENTERED = ("checkpoints", "tensorboard", "tokenizer", "jobs", "processes", "wandb")
COMPLETE, UNFINISHED, FAILED = "complete", "unfinished", "failed"


@dataclass(frozen=True)
class Run:
    """One work directory."""

    name: str
    """Its path, relative to the folder that is reported."""
    fields: dict[str, Any]
    """Its config by dotted names, without IGNORED; empty if it never got one."""
    state: str
    """COMPLETE, UNFINISHED or FAILED."""
    error: str
    """The last line of the error of a failed run."""
    step: int
    steps: int
    """Steps that were done (that is: logged) and that the config asks for."""
    metrics: dict[str, float]
    """The newest value of each metric; final ones if the run is complete."""
    cost: Cost


@dataclass(frozen=True)
class Group:
    """Complete runs that are equal except for the seed."""

    fields: dict[str, Any]
    """What tells this group from the others."""
    runs: tuple[Run, ...]

    def mean_std(self, column: str) -> tuple[float, float]:
        """Mean and sample standard deviation (ddof = 1; NaN for one run) of a column."""
        return mean_std([value_of(run, column) for run in self.runs])


def find_runs(root: Path) -> list[Run]:
    """All work directories at and below a folder, by path.

    A work directory has a `config.json`, or the `error.txt` of a run that did not get that far.

    Raises:
      ValueError: there is no such folder, or no run in it.
    """
    if not root.is_dir():
        raise ValueError(f"no such directory: {root}")
    found = []
    for folder, children, files in os.walk(root):
        children[:] = sorted(set(children) - set(NOT_ENTERED))
        if {"config.json", "error.txt"} & set(files):
            found.append(read_run(Path(folder), root))
    if not found:
        raise ValueError(f"no run (a folder with config.json) in or below {root}")
    return sorted(found, key=lambda run: run.name)


def read_run(workdir: Path, root: Path) -> Run:
    """Reads one work directory, in whatever state a kill has left it."""
    name = str(workdir.relative_to(root)) if workdir != root else workdir.resolve().name
    path, lines, error = workdir / "config.json", read_metrics(workdir), last_error(workdir)
    nothing = {"metrics": last_values(lines), "cost": training_cost([], 1)}
    try:
        config = load_config(path) if path.exists() else None
    except ValueError as unreadable:
        config, error = None, str(unreadable)
    if config is None:
        return Run(name, {}, FAILED, error, last_step(lines), 0, **nothing)
    result = read_result(workdir)
    state = COMPLETE if result else FAILED if error else UNFINISHED
    return Run(
        name=name,
        fields={k: v for k, v in flatten(config).items() if not k.startswith(IGNORED)},
        state=state,
        error=error if state == FAILED else "",
        step=result["step"] if result else last_step(lines),
        steps=config.train.steps,
        metrics=last_values([*lines, result["metrics"]] if result else lines),
        cost=Cost(**result["cost"]) if result else training_cost(lines, config.data.batch_size),
    )


def differing_fields(runs: Sequence[Run]) -> list[str]:
    """Fields that do not have the same value in all runs that have a config, in config order."""
    configs = [run.fields for run in runs if run.fields]
    names = dict.fromkeys(name for fields in configs for name in fields)
    return [n for n in names if len({json.dumps(c.get(n)) for c in configs}) > 1]


def group_by_seed(runs: Iterable[Run]) -> list[Group]:
    """The complete runs, grouped by all that differs but the seed, in order of those values."""
    complete = [run for run in runs if run.state == COMPLETE]
    fields = [field for field in differing_fields(complete) if field != "seed"]
    groups: dict[tuple, list[Run]] = {}
    for run in complete:
        groups.setdefault(tuple(run.fields.get(field) for field in fields), []).append(run)
    order = sorted(groups, key=lambda key: [_sort_key(value) for value in key])
    return [Group(dict(zip(fields, key, strict=True)), tuple(groups[key])) for key in order]


def _sort_key(value: Any) -> tuple:
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def value_of(run: Run, column: str) -> float:
    """A metric ("retrieval/t2v_r1") or a cost ("secs_per_clip") of a run; NaN if it has none."""
    if column in Cost._fields:
        return getattr(run.cost, column)
    return run.metrics.get(column, math.nan)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof = 1; NaN for one value).

    >>> mean_std([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), std


def lower_is_better(metric: str) -> bool:
    """True for ranks and losses."""
    return metric.endswith("_rank") or metric.startswith("loss/")


def pareto_front(
    cost: Float[np.ndarray, " n"], quality: Float[np.ndarray, " n"]
) -> Int[np.ndarray, " p"]:
    """Indices, by rising cost, of the points that no other beats.

    A point is beaten by one that is at least as good and as cheap, and better in one of the two;
    so equal points stay together. A point with a NaN is never on the front.
    """
    known = np.flatnonzero(~np.isnan(cost) & ~np.isnan(quality))
    order = known[np.lexsort((-quality[known], cost[known]))]
    best_before, front = -np.inf, []
    for i in order:
        equal_to_last = front and (cost[i], quality[i]) == (cost[front[-1]], quality[front[-1]])
        if quality[i] > best_before or equal_to_last:
            front.append(i)
            best_before = quality[i]
    return np.array(front, dtype=int)
