"""The compile benchmark: a second process finds in the cache what the first has compiled."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import compile as benchmark


def secs(state: float, trace: float, step: float) -> dict[str, float]:
    return {"state": state, "trace": trace, "compile": step - trace, "step": step}


def test_table():
    cold = [secs(1, 2, 32), secs(3, 2, 42), secs(2, 3, 36)]
    row = {"size": "B", "variant": "SMAUG", "cold": cold, "cached": [secs(0.5, 2.5, 3.5)]}
    table = benchmark.format_table([row]).splitlines()
    assert table[2:] == [
        "| B/16 | SMAUG | cold | 2.0 (1.0-3.0) | 2.0 (2.0-3.0) | 33.0 (30.0-40.0) "
        "| 36.0 (32.0-42.0) |",
        "| B/16 | SMAUG | cached | 0.5 (0.5-0.5) | 2.5 (2.5-2.5) | 1.0 (1.0-1.0) | 3.5 (3.5-3.5) |",
    ]


@pytest.mark.slow
def test_the_second_process_finds_all_that_the_first_compiled(tmp_path, monkeypatch):
    """Nothing new is in the cache after it."""
    in_own_process, cached = benchmark.in_own_process, []

    def and_look(*arguments: object, env: dict[str, str]) -> dict[str, float]:
        measured = in_own_process(*arguments, env=env)
        cached.append(set(Path(env["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache")))
        return measured

    monkeypatch.setattr(benchmark, "in_own_process", and_look)
    benchmark.main(("S",), ("masked",), frames=1, batch_size=2, repeats=1, out_dir=tmp_path)
    assert cached[0] and cached[0] == cached[1]
    [row] = json.loads((tmp_path / "compile.json").read_text())["rows"]
    assert all(min(row[cache][0].values()) > 0 for cache in ("cold", "cached"))
