"""How far a run is and what it cost: `result.json`, written last, and the lines of metrics."""

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlmae.files import write_whole
from vlmae.metric_writer import read_metrics


class Cost(NamedTuple):
    """What the training of a run took; NaN where nothing was logged."""

    flops_per_clip: float
    """Operations of the matrix products of a training step, per clip: a mean over the steps."""
    secs_per_clip: float
    """Seconds of the loop per clip, without compilation and evaluation: a median over log lines,
    each of which is a mean over its own steps."""
    total_flops: float
    """Operations of all steps so far."""
    total_secs: float
    """Seconds of all steps so far, without compilation and evaluation."""


def write_result(
    workdir: Path, step: int, metrics: dict[str, float], batch_size: int
) -> dict[str, object]:
    """Writes `result.json`, which says that the run is complete; returns what it holds.

    It names the `config.json` it belongs to: when the directory's config changes afterwards, the
    result does not count any more.
    """
    cost = training_cost(read_metrics(workdir), batch_size)
    result = {
        "step": step,
        "metrics": metrics,
        "cost": cost._asdict(),
        "config_sha256": _digest(workdir / "config.json"),
    }
    write_whole(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def read_result(workdir: Path) -> dict | None:
    """The `result.json` of a complete run, or None: the run, with its present config, is not."""
    path, config = workdir / "result.json", workdir / "config.json"
    if not (path.exists() and config.exists()):
        return None
    result = json.loads(path.read_text())
    return result if result["config_sha256"] == _digest(config) else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def last_step(lines: list[dict]) -> int:
    """The last step that was logged; 0 if none was."""
    return max((line["step"] for line in lines), default=0)


def last_values(lines: list[dict]) -> dict[str, float]:
    """The newest value of each metric."""
    values = {name: float(value) for line in lines for name, value in line.items()}
    values.pop("step", None)
    return values


def last_error(workdir: Path) -> str:
    """The last line of `error.txt`; "" if the last start left no error."""
    path = workdir / "error.txt"
    lines = path.read_text().split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def forget_error(workdir: Path) -> None:
    """Removes the `error.txt` of an earlier start."""
    (workdir / "error.txt").unlink(missing_ok=True)


def record_error(workdir: Path, text: str) -> None:
    """Writes `error.txt`, unless another process of the run has: what failed first is the cause."""
    path = workdir / "error.txt"
    if workdir.is_dir() and not path.exists():
        write_whole(path, text)


def training_cost(lines: list[dict], batch_size: int) -> Cost:
    """Cost from the lines of a run's metrics; a line speaks for the steps since the one before.

    Where batches of images and of clips alternate, "clip" means either.
    """
    lines = [line for line in lines if "speed/clips_per_sec" in line]
    if not lines:
        return Cost(math.nan, math.nan, math.nan, math.nan)

    def column(name: str) -> np.ndarray:
        return np.array([float(line.get(name, math.nan)) for line in lines])

    steps = column("step")
    window = np.diff(steps, prepend=0)
    flops = float(np.average(column("speed/flops_per_clip"), weights=window))
    return Cost(
        flops_per_clip=flops,
        secs_per_clip=float(np.median(1 / column("speed/clips_per_sec"))),
        total_flops=flops * batch_size * float(steps[-1]),
        total_secs=float(np.sum(column("speed/secs_per_step") * window)),
    )
