"""Sweeps as lists of runs: products of overrides, with a work directory and a state each.

A sweep is a function `sweep_NAME()` of an experiment file that yields overrides by dotted names:

    def sweep_mask_ratio():
        for ratio in (0.5, 0.65, 0.75):
            yield {"model.video.mask.ratio": ratio}
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.config import check
from vlmae.config import ExperimentConfig, load_config
from vlmae.config_tree import flatten, override
from vlmae.metric_writer import read_metrics
from vlmae.result import last_error, last_step, read_result
from vlmae.workdir import RESUME_MAY_CHANGE

Sweep = Callable[[], Iterable[Mapping[str, Any]]]
COMPLETE = "complete"
MAX_NAME = 160  # characters of a directory's name; file systems take 255 bytes


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    index: int
    changes: dict[str, Any]
    workdir: Path


def sweep_name(sweep: Sweep) -> str:
    """`sweep_mask_ratio` -> "mask_ratio"."""
    return sweep.__name__.removeprefix("sweep_")


def choose_sweeps(sweeps: Sequence[Sweep], names: str) -> list[Sweep]:
    """The sweeps of these comma-separated names.

    Raises:
      ValueError: a name is unknown; lists those that exist.
    """
    known = {sweep_name(sweep): sweep for sweep in sweeps}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        check(name in known, f"unknown sweep {name!r}; there is: {', '.join(known) or 'none'}")
    return [known[name] for name in wanted]


def plan_runs(sweeps: Sequence[Sweep], root: Path) -> list[SweepRun]:
    """The product of the sweeps; the last one varies fastest.

    Raises:
      ValueError: a sweep is empty, two sweeps set a field to different values in one run, or two
        runs are the same.
    """
    parts = [[(sweep_name(sweep), dict(changes)) for changes in sweep()] for sweep in sweeps]
    for sweep, part in zip(sweeps, parts, strict=True):
        check(len(part) > 0, f"sweep {sweep_name(sweep)} yields no run")
    combined = [merge_changes(combination) for combination in itertools.product(*parts)]
    short = short_names({name for changes in combined for name in changes})
    names = [directory_name(changes, short) for changes in combined]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    check(not repeated, f"the sweep has the same run more than once: {', '.join(repeated)}")
    rows = enumerate(zip(combined, names, strict=True))
    return [SweepRun(i, changes, root / name) for i, (changes, name) in rows]


def merge_changes(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The overrides of one run from those of several sweeps, each with its sweep's name.

    Raises:
      ValueError: two sweeps set a field to different values.
    """
    merged, owners = {}, {}
    for owner, changes in parts:
        for field, value in changes.items():
            check(
                field not in merged or merged[field] == value,
                f"sweeps {owners.get(field)} and {owner} both set {field}: "
                f"to {merged.get(field)!r} and to {value!r}",
            )
            merged[field], owners[field] = value, owner
    return merged


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """For each dotted name its last two parts, or as many more as tell it from the others.

    >>> short_names(["model.video.mask.ratio", "seed"])
    {'model.video.mask.ratio': 'mask.ratio', 'seed': 'seed'}
    """
    fields = list(fields)

    def shortest(field: str) -> str:
        parts = field.split(".")
        suffixes = [parts[-n:] for n in range(min(2, len(parts)), len(parts))]
        for suffix in suffixes:
            ends = "." + ".".join(suffix)
            if not suffix[0].isdigit() and sum(f".{other}".endswith(ends) for other in fields) == 1:
                return ends[1:]
        return field

    return {field: shortest(field) for field in fields}


def directory_name(changes: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """A readable name of a run, safe on any file system: mask.ratio=0.75,seed=1.

    The fields are sorted, so that the order in which sweeps are named does not matter. A name that
    cannot hold the values as they are ends with a digest of them.
    """
    exact = ",".join(f"{short[field]}={changes[field]}" for field in sorted(changes))
    safe = ",".join(f"{short[field]}={_safe(changes[field])}" for field in sorted(changes))
    if safe == exact and 0 < len(safe) <= MAX_NAME:
        return safe
    text = json.dumps(changes, sort_keys=True, default=str)
    return f"{safe[:MAX_NAME] or 'default'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _safe(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]", "_", str(value))


def run_at(runs: Sequence[SweepRun], index: int) -> SweepRun:
    """The run of an index; raises ValueError if there is none."""
    check(0 <= index < len(runs), f"--index {index} is not in 0 ... {len(runs) - 1}")
    return runs[index]


def run_state(base: ExperimentConfig, run: SweepRun) -> str:
    """COMPLETE, "step n of N", "not started", "failed ...", or why it cannot run. Only reads."""
    try:
        config = override(base, run.changes)
        path = run.workdir / "config.json"
        stored = load_config(path) if path.exists() else None
    except ValueError as error:
        return f"refused: {str(error).splitlines()[0]}"
    failed = last_error(run.workdir)
    if stored is None:
        return f"failed: {failed}" if failed else "not started"
    different = changed_fields(stored, config)
    for field in different:
        if not field.startswith(RESUME_MAY_CHANGE):
            return f"the directory belongs to another config ({field})"
    if not different and read_result(run.workdir):
        return COMPLETE
    at = f"step {last_step(read_metrics(run.workdir))} of {config.train.steps}"
    return f"failed at {at}: {failed}" if failed else at


def changed_fields(stored: ExperimentConfig, config: ExperimentConfig) -> list[str]:
    """Fields in which a config differs from a run's own, what the tokenizer filled in aside."""
    filled = ("model.text.cls_id", "model.text.mask_id", "objectives.mcm_template_ids")
    if not config.model.text.vocab_size:
        filled += ("model.text.vocab_size",)
    old, new = flatten(stored), flatten(config)
    different = [field for field in old.keys() | new.keys() if old.get(field) != new.get(field)]
    return sorted(field for field in different if not field.startswith(filled))


def format_runs(base: ExperimentConfig, runs: Sequence[SweepRun]) -> str:
    """The table that --list prints."""
    rows = [("index", "overrides", "work directory", "state")]
    for run in runs:
        changes = " ".join(f"{field}={value}" for field, value in run.changes.items())
        rows.append((str(run.index), changes, str(run.workdir), run_state(base, run)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )


def overruled_flags(runs: Sequence[SweepRun], argv: Sequence[str]) -> list[str]:
    """Fields that the command line sets although the sweep sets them too."""
    flags = {arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    flags |= {flag.replace(".no_", ".") for flag in flags}  # --data.no-flip
    return sorted({field for run in runs for field in run.changes if field in flags})
