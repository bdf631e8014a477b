"""A tiny prepared data set, and the tiny experiment on it."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
import tiny_experiment

from data_pipelines.storage.prepare import prepare
from vlmae.config.experiment import ExperimentConfig


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory) -> Iterator[Path]:
    """A data_dir with a `shapes` of 48 training and 12 test clips of 32 x 32 pixels.

    All tests read it; one that writes copies it first.
    """
    data_dir = tmp_path_factory.mktemp("tiny_data")
    prepare("shapes", data_dir, num_train=48, num_val=8, num_test=12, frame_size=32)
    before = _files(data_dir)
    yield data_dir
    assert _files(data_dir) == before, "a test wrote into the data that all tests share"


def _files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def tiny_config(tiny_data_dir) -> ExperimentConfig:
    """The tiny experiment on that data set."""
    config = tiny_experiment.get_config()
    data = dataclasses.replace(config.data, data_dir=str(tiny_data_dir))
    return dataclasses.replace(config, data=data)


@pytest.fixture
def run_tiny(tiny_data_dir, tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, Path]]:
    """Runs the tiny experiment's command line in this process.

    Returns exit code, stderr and work directory; flags that are given twice count as given last.
    """

    def run(*flags: str, workdir: Path = tmp_path / "run") -> tuple[int, str, Path]:
        where = ["--data.data-dir", str(tiny_data_dir), "--workdir", str(workdir)]
        monkeypatch.setattr(sys, "argv", ["tiny_experiment.py", *where, *flags])
        try:
            tiny_experiment.main(tiny_experiment.get_config)
            code: int | str | None = 0
        except SystemExit as end:
            code = end.code
        err = capsys.readouterr().err
        return (1, f"{err}{code}\n", workdir) if isinstance(code, str) else (code, err, workdir)

    return run


@pytest.fixture
def script_env() -> dict[str, str]:
    """The environment of a script that a test starts: this process's device and compile cache."""
    return os.environ | {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
