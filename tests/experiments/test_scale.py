"""The benchmark of growth: every case runs, and its table tells squares from straight lines."""

import math

import pytest

from experiments.benchmarks.scale import CASES, exponent, format_rows


@pytest.mark.parametrize("case", CASES)
def test_every_case_runs(case):
    run = CASES[case][1](60)
    found = run() or {}
    assert all(seconds >= 0 for seconds in found.get("seconds", {}).values())
    assert case != "search" or found["bytes_written"] > 60 * 256 * 4


def test_exponents():
    assert exponent([(1, 9.0), (10, 3.0), (20, 12.0)]) == pytest.approx(2)
    assert exponent([(10, 3.0), (30, 9.0)]) == pytest.approx(1)
    assert math.isnan(exponent([(10, 3.0)]))


def test_the_table_has_a_row_for_each_timed_part():
    points = [
        {"n": n, "seconds": {"build": 2.0 * n, "query": float(n * n)}, "peak_mib": 7.0}
        for n in (10, 20)
    ]
    lines = format_rows({"search": points}).splitlines()
    assert lines[2] == "| index of n clips in 50 steps: build | 10 / 20 | 20 / 40 | 1.0 | 7 / 7 |"
    assert lines[3].endswith("query | 10 / 20 | 1e+02 / 4e+02 | 2.0 | 7 / 7 |")
