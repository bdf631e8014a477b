"""Runs stopped between two steps, and two runs compared: parameters and metrics, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from vlmae.parallel.sharding import path_name
from vlmae.runs.checkpoint import load_params
from vlmae.runs.metric_writer import MetricWriter, read_metrics

SPEEDS = ("secs_per_step", "clips_per_sec", "data_wait_share", "matrix_rate_share")
TIMES = tuple(f"speed/{name}" for name in SPEEDS)
EVALUATION = ("retrieval.json", "retrieval.jsonl")  # files of a tiny run's evaluation
NEVER_EQUAL = (*TIMES, "memory/peak_bytes")


class Stopped(Exception):
    """What a test raises to end a run between two steps."""


def before_metrics_of(step: int, act: Callable[[], None], monkeypatch) -> None:
    """Does something when the metrics of `step` are to be written."""
    write = MetricWriter.write

    def act_and_write(self, written_step: int, metrics: dict) -> None:
        if written_step == step:
            act()
        write(self, written_step, metrics)

    monkeypatch.setattr(MetricWriter, "write", act_and_write)


def stop() -> None:
    raise Stopped


def flat_params(workdir: Path) -> dict[str, np.ndarray]:
    """The parameters of a run's last checkpoint, by name."""
    return by_name(load_params(workdir)[0])


def by_name(params: PyTree) -> dict[str, np.ndarray]:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def history(workdir: Path) -> list[dict]:
    """All lines of metrics, without those about time and memory."""
    lines = read_metrics(workdir)
    return [{k: v for k, v in line.items() if k not in NEVER_EQUAL} for line in lines]


def assert_same_run(workdir: Path, unbroken: Path) -> None:
    """Parameters and the history of metrics are equal, bit for bit."""
    ours, theirs = flat_params(workdir), flat_params(unbroken)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert not different
    assert history(workdir) == history(unbroken)
