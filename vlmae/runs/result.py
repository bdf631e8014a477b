"""Result, cost and error of a run: `result.json`, which is written last, and `error.txt`."""

import contextlib
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.schema.checks import check
from data_pipelines.schema.json_files import read_record
from vlmae.runs.atomic_files import write_json, write_whole
from vlmae.runs.metric_writer import check_numbers, read_metrics


class Cost(NamedTuple):
    """Cost of training a run; NaN where nothing was logged."""

    flops_per_clip: float
    """FLOPs of the matrix products of a training step, per clip: a mean over the steps."""
    secs_per_clip: float
    """Seconds of the loop per clip, without compilation and evaluation: a median over log lines,
    each of which is a mean over its own steps."""
    total_flops: float
    """FLOPs of all steps so far."""
    total_secs: float
    """Seconds of all steps so far, without compilation and evaluation."""


@dataclass(frozen=True)
class _Result:
    """Contents of `result.json`; its numbers may be NaN."""

    step: int
    metrics: Mapping[str, Any]
    cost: Mapping[str, Any]
    config_sha256: str


def write_result(
    workdir: Path, step: int, metrics: dict[str, float], batch_size: int
) -> dict[str, object]:
    """Write `result.json`, which marks the run as complete; return its contents.

    It holds a digest of `config.json`: a result no longer counts after the directory's config has
    changed, for example to more steps.
    """
    cost = training_cost(read_metrics(workdir), batch_size)
    result = {
        "step": step,
        "metrics": metrics,
        "cost": cost._asdict(),
        "config_sha256": _digest(workdir / "config.json"),
    }
    # Atomically, since its presence alone says that the run is complete.
    write_json(workdir / "result.json", result)
    return result


def read_result(workdir: Path) -> dict | None:
    """Read `result.json`; None if the run, with its present config, is not complete.

    Raises:
      UserError: the file is damaged; names it.
    """
    path, config = workdir / "result.json", workdir / "config.json"
    if not (path.exists() and config.exists()):
        return None
    result = vars(read_record(_Result, path))
    for numbers in (result["metrics"], result["cost"]):
        check_numbers(numbers, path)
    known = {*result["cost"]} == {*Cost._fields}
    check(known, f"{path}: cost must hold {', '.join(Cost._fields)}")
    return result if result["config_sha256"] == _digest(config) else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def forget_result(workdir: Path) -> None:
    """Remove the `result.json` of a run that has steps to do."""
    (workdir / "result.json").unlink(missing_ok=True)


def last_step(lines: list[dict]) -> int:
    """Return the last step that was logged; 0 if none was."""
    return max((line["step"] for line in lines), default=0)


def last_values(lines: list[dict]) -> dict[str, float]:
    """Return the newest value of each metric."""
    values = {name: float(value) for line in lines for name, value in line.items()}
    values.pop("step", None)
    return values


def last_error(workdir: Path) -> str:
    """Read the last line of `error.txt` without the module of the error's class; "" if none."""
    path = workdir / "error.txt"
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    # "vlmae.training.train_log.NonFiniteLoss: step 3" -> "NonFiniteLoss: step 3"
    return re.sub(r"^(\w+\.)+(?=\w+(: |$))", "", last)


def forget_error(workdir: Path) -> None:
    """Remove the `error.txt` of an earlier start."""
    (workdir / "error.txt").unlink(missing_ok=True)


def record_error(workdir: Path, text: str) -> None:
    """Write `error.txt` unless another process of the run has: the first failure is the cause.

    A disk that is full or away is no second error.
    """
    path = workdir / "error.txt"
    # Without a folder the config was refused, and there is no run to record anything about.
    with contextlib.suppress(OSError):
        if workdir.is_dir() and not path.exists():
            write_whole(path, text)


def training_cost(lines: list[dict], batch_size: int) -> Cost:
    """Compute the cost from a run's metrics; a line stands for the steps since the one before.

    Args:
      lines: of `metrics.jsonl`, in order of steps.
      batch_size: clips of a global batch. Where batches of images and of clips alternate, an image
        counts as a clip.
    """
    lines = [line for line in lines if "speed/clips_per_sec" in line]
    if not lines:
        return Cost(math.nan, math.nan, math.nan, math.nan)

    def column(name: str) -> np.ndarray:
        return np.array([float(line.get(name, math.nan)) for line in lines])

    steps = column("step")
    window = np.diff(steps, prepend=0)  # steps that each line stands for
    flops = float(np.average(column("speed/flops_per_clip"), weights=window))
    return Cost(
        flops_per_clip=flops,
        # A median, since single lines are slowed by checkpoints and by other users of the machine.
        secs_per_clip=float(np.median(1 / column("speed/clips_per_sec"))),
        total_flops=flops * batch_size * float(steps[-1]),
        total_secs=float(np.sum(column("speed/secs_per_step") * window)),
    )
