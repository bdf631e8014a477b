"""Sweeps as lists of runs: products of overrides, each with a work directory and a state.

A sweep is a function `sweep_NAME()` of an experiment file that yields overrides by dotted names:

    def sweep_mask_ratio():
        for ratio in (0.5, 0.65, 0.75):
            yield {"model.video.mask.ratio": ratio}

or a field and its values on the command line: `model.video.mask.ratio=0.5,0.65,0.75`.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.schema.checks import UserError, check, first_line
from vlmae.config.epochs import TAKES_PLACE, change
from vlmae.config.experiment import ExperimentConfig, load_config
from vlmae.config.tree import differing, flatten
from vlmae.runs.newest import NewestMetrics
from vlmae.runs.result import last_error, read_result
from vlmae.runs.tables import align

Sweep = Callable[[], Iterable[Mapping[str, Any]]]
COMPLETE = "complete"
MAX_NAME = 160  # characters of a directory's name, plus a digest; file systems take 255 bytes


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    index: int
    changes: dict[str, Any]
    workdir: Path


def sweep_name(sweep: Sweep) -> str:
    """Name a sweep after its function: `sweep_mask_ratio` -> "mask_ratio"."""
    return sweep.__name__.removeprefix("sweep_")


def choose_sweeps(sweeps: Sequence[Sweep], words: Sequence[str]) -> list[Sweep]:
    """Read the words of `--sweep`: names of sweeps, separated by commas, or FIELD=VALUE,VALUE,...

    Raises:
      UserError: a name is unknown; lists those that exist. Or a field has no values.
    """
    known = {sweep_name(sweep): sweep for sweep in sweeps}
    chosen = []
    for word in words:
        if "=" in word:
            chosen.append(typed_sweep(word))
            continue
        for name in map(str.strip, word.split(",")):
            there = ", ".join(known) or "none"
            check(
                name in known,
                f"unknown sweep {name!r}; there is: {there}; or give values: FIELD=VALUE,VALUE",
            )
            chosen.append(known[name])
    return chosen


def typed_sweep(word: str) -> Sweep:
    """Make the sweep of FIELD=VALUE,VALUE,...; values are read as JSON, or else as words.

    >>> list(typed_sweep("optim.learning-rate=1e-4,3e-4")())
    [{'optim.learning_rate': 0.0001}, {'optim.learning_rate': 0.0003}]
    """
    name, _, text = word.partition("=")
    field = name.strip().replace("-", "_")
    # Commas within brackets belong to a value: stages=[1],[1,2].
    texts = [value.strip() for value in re.split(r",(?![^\[]*\])", text)]
    check(all(texts), f"--sweep {word}: a value is missing")

    def sweep() -> Iterator[dict[str, Any]]:
        for value in texts:
            yield {field: json_or_word(value)}

    sweep.__name__ = field
    return sweep


def json_or_word(text: str) -> Any:
    """Read a value as it is typed: a number, true, false, null, a list in brackets, or a word."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def check_typed(base: ExperimentConfig, runs: Sequence[SweepRun], words: Sequence[str]) -> None:
    """Check all runs of a sweep with values from the command line, before the first one starts.

    Raises:
      UserError: a run is refused; names its overrides.
    """
    for run in runs if any("=" in word for word in words) else ():
        try:
            change(base, run.changes)
        except UserError as error:
            changes = " ".join(f"{field}={value}" for field, value in run.changes.items())
            raise UserError(f"run {run.index} of --sweep, {changes}: {error}") from error


def plan_runs(sweeps: Sequence[Sweep], root: Path) -> list[SweepRun]:
    """List the runs of the product of sweeps; the last sweep varies fastest.

    Raises:
      UserError: a sweep is empty, two sweeps set a field to different values in one run, or two
        runs are the same.
    """
    # Read once: a generator that draws would give other runs the second time.
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
    """Merge the overrides of several sweeps, given with the names of the sweeps.

    Raises:
      UserError: two sweeps set a field to different values.
    """
    merged: dict[str, Any] = {}
    owners: dict[str, str] = {}
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
    """Shorten dotted names to their last two parts, or to as many as keep them apart.

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
    """Name a run readably and safely for any file system: mask.ratio=0.75,seed=1.

    Fields are sorted, so that the order of the sweeps on the command line does not matter. A name
    that cannot hold the values as they are ends with a digest of them.
    """
    texts = {short[field]: str(changes[field]) for field in sorted(changes)}
    exact = ",".join(f"{name}={text}" for name, text in texts.items())
    safe = ",".join(
        f"{name}={re.sub(r'[^A-Za-z0-9._+-]', '_', text)}" for name, text in texts.items()
    )
    # Readable where possible: people find runs by their folders.
    if safe == exact and 0 < len(safe) <= MAX_NAME:
        return safe
    # Values that differ only in replaced characters must not share a directory.
    text = json.dumps(changes, sort_keys=True, default=str)
    return f"{safe[:MAX_NAME] or 'default'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def run_at(runs: Sequence[SweepRun], index: int) -> SweepRun:
    """Return the run of an index; raises UserError if there is none."""
    check(0 <= index < len(runs), f"--index {index} is not in 0 ... {len(runs) - 1}")
    return runs[index]


def run_state(base: ExperimentConfig, run: SweepRun) -> str:
    """Describe how far a run is; only reads files.

    Returns:
      COMPLETE, "step n of N", "not started", "failed ...", "damaged: ..." or "refused: ...".
    """
    try:
        config = change(base, run.changes)
        path = run.workdir / "config.json"
        stored = load_config(path) if path.exists() else None
    except UserError as error:
        return f"refused: {first_line(error)}"
    failed = last_error(run.workdir)
    if stored is None:
        return f"failed: {failed}" if failed else "not started"
    from vlmae.runs.workdir import RESUME_MAY_CHANGE  # imports jax, which reports do not need

    different = changed_fields(stored, config)
    for field in different:
        if not field.startswith(RESUME_MAY_CHANGE):
            return f"the directory belongs to another config ({field})"
    try:
        if not different and read_result(run.workdir):
            return COMPLETE
        # The run's own, since epochs become steps when it begins.
        steps = stored.train.steps if config.train.epochs else config.train.steps
        at = f"step {NewestMetrics(run.workdir).read()[0]} of {steps}"
    except UserError as error:
        return f"damaged: {error}"
    return f"failed at {at}: {failed}" if failed else at


def changed_fields(stored: ExperimentConfig, config: ExperimentConfig) -> list[str]:
    """Name the fields in which a config differs from a run's own.

    Fields that the tokenizer, the devices and the size of the data fill in do not count.
    """
    # Stored configs hold what the tokenizer and the data said, new ones do not yet.
    filled: tuple[str, ...] = (
        "model.text.cls_id",
        "model.text.mask_id",
        "objectives.mcm_template_ids",
    )
    if not config.model.text.vocab_size:
        filled += ("model.text.vocab_size",)
    if not config.objectives.local_groups:
        filled += ("objectives.local_groups",)
    if not config.data.eval.name:
        filled += ("data.eval.name",)
    given = flatten(config)
    filled += tuple(steps for steps, relative in TAKES_PLACE.items() if given[relative])
    return [name for name in differing(stored, config) if not name.startswith(filled)]


def format_runs(base: ExperimentConfig, runs: Sequence[SweepRun]) -> str:
    """Format the table that --list prints."""
    rows = [("index", "overrides", "work directory", "state")]
    for run in runs:
        changes = " ".join(f"{field}={value}" for field, value in run.changes.items())
        rows.append((str(run.index), changes, str(run.workdir), run_state(base, run)))
    return align(rows)


def overruled_flags(runs: Sequence[SweepRun], argv: Sequence[str]) -> list[str]:
    """Name the fields that both the command line and the sweep set."""
    named = named_fields(argv)
    return sorted({field for run in runs for field in run.changes if field in named})


def named_fields(argv: Sequence[str]) -> set[str]:
    """Return the fields that a command line names as flags, whatever it gives them.

    >>> sorted(named_fields(["--data.batch-size", "8", "--data.no-flip", "--seed=3"]))
    ['data.batch_size', 'data.flip', 'data.no_flip', 'seed']
    """
    flags = {arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    return flags | {flag.replace(".no_", ".") for flag in flags}
