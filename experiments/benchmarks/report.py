"""Reports of benchmarks: ratios within a round, tables, settings, and the machine."""

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmae.runs.workdir import environment, versions

COMPARED = (
    "torch",
    "transformers",
    "av",
    "decord",
    "webdataset",
    "open_clip_torch",
)  # packages that ours is compared with


def compare(base: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    """Divide `base` by `own` round by round; return the median ratio and its range."""
    ratios = [first / second for first, second in zip(base, own, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def format_ratio(compared: Mapping[str, Any]) -> str:
    """Format a result of `compare`: 2.10 (2.09-2.54)."""
    low, high = compared["ratio_range"]
    return f"{compared['ratio']:.2f} ({low:.2f}-{high:.2f})"


def write_report(
    out_dir: Path, name: str, table: str, settings: dict[str, Any], **content: Any
) -> None:
    """Write NAME.md, the table, and NAME.json: command, settings, device, versions and content.

    `docs/make_results.py --add NAME.json` takes the table over into docs/results.md.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.orig_argv[1:]])
    report = {"command": command, "settings": settings, "environment": measured_on()} | content
    (out_dir / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (out_dir / f"{name}.md").write_text(table + "\n")


def print_report(table: str, settings: dict[str, Any]) -> None:
    """Print settings, device and versions, then the table."""
    here = measured_on()
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    print(f"{settings}\non {', '.join(here['devices'])}; {here['cpu']}; {packages}\n{table}")


def measured_on() -> dict[str, Any]:
    """Return the environment of a run, and the versions of the packages it is compared with."""
    here = environment()
    return here | {"packages": here["packages"] | versions(COMPARED)}
