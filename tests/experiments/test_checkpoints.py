"""The benchmark of checkpoints, with a state of a few numbers."""

import numpy as np

from experiments.benchmarks.checkpoints import format_table, measure


def test_a_checkpoint_is_measured(tmp_path):
    state = {"params": {"w": np.ones((64, 64), np.float32)}, "step": np.int32(1)}
    found = measure(state, tmp_path)
    assert found["gib"] * 2**30 > 0 and found["sums_bytes"] > 64
    assert 0 < found["write"] and 0 < found["check"] < found["restore"]
    [head, _, row] = format_table([{"size": "B", "runs": [found] * 3}]).splitlines()
    assert head.count("|") == row.count("|") and row.startswith("| B/16 | 0.00 | ")
