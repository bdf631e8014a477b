"""What benchmarks have in common at their end: ratios of the same round, and the files."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmae.workdir import environment


def compare(base: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    """How many times `own` goes into `base`, round by round: the median, and from least to most."""
    ratios = [first / second for first, second in zip(base, own, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def write_report(out_dir: Path, name: str, table: str, **content: Any) -> None:
    """Writes NAME.md, the table, and NAME.json: the content, with devices and versions."""
    out_dir.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment()} | content
    (out_dir / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (out_dir / f"{name}.md").write_text(table + "\n")
