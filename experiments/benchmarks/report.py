"""What benchmarks have in common at their end: ratios of the same round, and what is reported."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmae.workdir import environment, versions

COMPARED = ("torch", "transformers", "av", "decord")  # packages that we are measured against


def compare(base: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    """How many times `own` goes into `base`, round by round: the median, and from least to most."""
    ratios = [first / second for first, second in zip(base, own, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def write_report(
    out_dir: Path, name: str, table: str, settings: dict[str, Any], **content: Any
) -> None:
    """Writes NAME.md, the table, and NAME.json: settings, device, versions and the content."""
    out_dir.mkdir(parents=True, exist_ok=True)
    report = {"settings": settings, "environment": measured_on()} | content
    (out_dir / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (out_dir / f"{name}.md").write_text(table + "\n")


def print_report(table: str, settings: dict[str, Any]) -> None:
    """Prints the table below its settings, device and versions."""
    here = measured_on()
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    print(f"{settings}\non {', '.join(here['devices'])}; {here['cpu']}; {packages}\n{table}")


def measured_on() -> dict[str, Any]:
    """A run's environment, with the packages that we are measured against."""
    here = environment()
    return here | {"packages": here["packages"] | versions(COMPARED)}
