"""The compile benchmark: a second process finds in the cache what the first has compiled."""

import pytest

from experiments.benchmarks import compile as benchmark
from experiments.benchmarks.own_process import cache_in, in_own_process


def test_table():
    cold = {"state": 1.0, "trace": 2.0, "compile": 30.0}
    cached = {"state": 0.5, "trace": 2.5, "compile": 1.0}
    row = {"size": "B", "variant": "SMAUG", "cold": cold, "cached": cached}
    table = benchmark.format_table([row]).splitlines()
    assert table[2:] == [
        "| B/16 | SMAUG | cold | 1.0 | 2.0 | 30.0 | 32.0 |",
        "| B/16 | SMAUG | cached | 0.5 | 2.5 | 1.0 | 3.5 |",
    ]


@pytest.mark.slow
def test_cache_spares_compiling(tmp_path):
    env = cache_in(str(tmp_path))
    cold, cached = (in_own_process(benchmark.measure, "S", "masked", 1, 2, env=env) for _ in "ab")
    assert cached["compile"] < cold["compile"] / 2
