"""Config and environment in a work directory, and which configs may continue its run."""

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.json_files import read_json
from vlmae.config.experiment import ExperimentConfig, load_config
from vlmae.config.tree import differing, flatten
from vlmae.parallel.gpu_settings import recorded_settings
from vlmae.runs.atomic_files import write_json, write_whole

# Fields that may differ when a run is continued: they change neither parameters nor batches. There
# are two exceptions: train.steps changes the schedule of the steps still to come, and local_groups
# the negatives of objectives with "local" scope; runs of older versions state none.
RESUME_MAY_CHANGE = (
    "name",
    "mesh.",
    "evaluation.",
    "data.data_dir",
    "data.tokenizer",
    "data.num_workers",
    "data.eval",
    "data.max_bad_ratio",
    "model.remat",
    "model.attention",
    "model.gradient_dtype",
    "objectives.local_groups",
    "train.steps",
    "train.epochs",
    "train.log_every_steps",
    "train.eval_every_",
    "train.save_every_",
    "train.max_skipped_steps",
    "train.max_rollbacks",
    "train.keep_checkpoints",
    "train.best_metric",
    "train.patience",
    "train.wandb_project",
    "train.max_idle_secs",
)
ENVIRONMENT = "environment.json"
DATA_FILE = "data.json"  # see `check_data`
DataState = Mapping[str, Mapping[str, int | str]]
INIT_REPORT = "init.txt"  # parameters loaded before the first step, by name
CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "vlmae")


def check_workdir(config: ExperimentConfig, workdir: Path) -> None:
    """Check that a work directory belongs to this config, or is new.

    Raises:
      UserError: the directory's config differs in a field that a continued run must keep; names
        each such field with both values. Or it holds checkpoints without a config.
    """
    path = workdir / "config.json"
    if not path.exists() and any((workdir / "checkpoints").glob("[0-9]*")):
        raise UserError(f"{workdir} holds checkpoints, but no config.json that says what they are")
    if path.exists():
        differences = config_differences(load_config(path), config)
        if differences:
            raise UserError(
                f"{workdir} belongs to another config (choose another --workdir):\n  "
                + "\n  ".join(differences)
            )


def write_run_metadata(config: ExperimentConfig, workdir: Path, loaded: str = "") -> None:
    """Write config, environment and, if given, the report of the loaded parameters."""
    workdir.mkdir(parents=True, exist_ok=True)
    if loaded:  # only at the first start; a resumed run keeps the report of the first
        write_whole(workdir / INIT_REPORT, loaded + "\n")
    save_config(config, workdir / "config.json")
    write_json(workdir / ENVIRONMENT, environment())


def has_checkpoint(workdir: Path) -> bool:
    """Return True if a run has begun in the directory and saved a step."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def check_data(found: DataState, workdir: Path, own: DataState) -> None:
    """Check that a run that goes on finds the data and the vocabulary that it began with.

    Args:
      found: of each source, the tokenizer and the classes, all that is compared, by name.
      workdir: the run's directory.
      own: the same of the tokenizer and the classes that lie in there.

    Raises:
      UserError: something differs, say because it was prepared anew; names it with both values.
    """
    other = [
        f"{name}: {key} {before[name].get(key, value)} there, {value} here"
        for before in (own, _data_before(workdir))
        for name in found.keys() & before.keys()
        for key, value in found[name].items()
        if before[name].get(key, value) != value
    ]
    other = sorted({*other})
    words = any(line.startswith("tokenizer: ") for line in other)
    data = any(not line.startswith("tokenizer: ") for line in other)
    ways = [f"remove {workdir / DATA_FILE}"] * data
    ways += [f"give --data.tokenizer={workdir / 'tokenizer'}, its own vocabulary"] * words
    check(
        not other,
        f"{workdir} was trained so far on other data, prepared anew, added to, or another copy "
        f"({'; '.join(other)}); to go on with these, {' and '.join(ways)}",
    )


def note_data(found: DataState, workdir: Path) -> None:
    """Note the data of a run for `check_data`: new ones if it goes on, all if it begins."""
    before = _data_before(workdir) if has_checkpoint(workdir) else {}
    write_json(workdir / DATA_FILE, {**before, **found})


def _data_before(workdir: Path) -> dict[str, dict]:
    path = workdir / DATA_FILE
    stored = read_json(path) if path.is_file() else {}
    # Earlier versions noted the digest alone.
    stored = {name: {"digest": x} if isinstance(x, str) else x for name, x in stored.items()}
    good = all(isinstance(x, dict) for x in stored.values())
    check(good, f"{path}: must hold an object for each source")
    return stored


def save_config(config: ExperimentConfig, path: Path) -> None:
    """Write the config as JSON, which `load_config` reads."""
    write_json(path, dataclasses.asdict(config))


def config_differences(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """List the fields that differ but must not when a run is continued, a line each."""
    left, right = flatten(old), flatten(new)
    return [
        f"{name}: {left.get(name)!r} there, {right.get(name)!r} here"
        for name in differing(old, new)
        if not name.startswith(RESUME_MAY_CHANGE)
    ]


def environment() -> dict:
    """Collect versions, git revision, devices, and variables that decide what is compiled."""
    return {
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "git_revision": git_revision(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "processes": jax.process_count(),
        "settings": recorded_settings(),
    }


def git_revision() -> str:
    """Return the commit of the source tree, with "+changes" if edited; "" outside a checkout."""
    # The library's own tree, not the current folder, which may be anyone's repository.
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed version of each package, or "not installed"."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {package: version(package) for package in packages}


def _cpu_name() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
