"""What a work directory says about its run: the config, the environment, and whose it is."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax

from vlmae.config import ExperimentConfig, load_config, save_config
from vlmae.config_tree import flatten
from vlmae.files import write_whole

# Fields that may differ when a run is continued: they change neither parameters nor batches,
# except train.steps, which lengthens or shortens the schedule of the steps still to come, and the
# mesh, which decides what objectives of "local" scope see.
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
    "train.steps",
    "train.log_every_steps",
    "train.eval_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.wandb_project",
    "train.max_idle_secs",
)
ENVIRONMENT = "environment.json"
INIT_REPORT = "init.txt"  # what was loaded before the first step, name by name
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # never opened: they can run code
CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "vlmae")


def holds_tensors(folder: Path) -> bool:
    """True of an export of a run and of what only looks like one; no work directory does."""
    if (folder / "checkpoints").is_dir():
        return False
    suffixes = (".safetensors", *PICKLES)
    files = folder.iterdir() if folder.is_dir() else [folder]
    return any(path.suffix in suffixes for path in files)


def load_run(workdir: Path) -> ExperimentConfig:
    """The config of a run, by its work directory or an export of it.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is damaged; names the file.
    """
    if not holds_tensors(workdir):
        return load_config(workdir / "config.json")
    from vlmae.interop.exported import read_export_config  # safetensors, only here

    return read_export_config(workdir)


def tokenizer_of(workdir: Path) -> Path:
    """The folder of a run's tokenizer; an export has it among its other files."""
    return workdir if holds_tensors(workdir) else workdir / "tokenizer"


def check_workdir(config: ExperimentConfig, workdir: Path) -> None:
    """Refuses the directory of another config.

    Raises:
      ValueError: the directory's config differs in a field that a continued run must keep; names
        each such field with both values.
    """
    path = workdir / "config.json"
    if path.exists():
        differences = config_differences(load_config(path), config)
        if differences:
            raise ValueError(
                f"{workdir} belongs to another config (choose another --workdir):\n  "
                + "\n  ".join(differences)
            )


def claim_workdir(config: ExperimentConfig, workdir: Path, loaded: str = "") -> None:
    """Writes config, environment and what was loaded; now the directory belongs to this config."""
    workdir.mkdir(parents=True, exist_ok=True)
    if loaded:
        write_whole(workdir / INIT_REPORT, loaded + "\n")
    save_config(config, workdir / "config.json")
    write_whole(workdir / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")


def config_differences(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """One line for each field that differs and must not, when a run is continued."""
    left, right = flatten(old), flatten(new)
    return [
        f"{name}: {left.get(name)!r} there, {right.get(name)!r} here"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name) and not name.startswith(RESUME_MAY_CHANGE)
    ]


def environment() -> dict:
    """Versions, git revision and devices, for the record."""
    return {
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "git_revision": git_revision(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "processes": jax.process_count(),
    }


def git_revision() -> str:
    """Commit of the source tree, with "+changes" if it was edited; "" outside a checkout."""
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
    """The installed versions."""

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
