"""Golden values: what counts as equal."""

import numpy as np
import pytest
from compare_runs import differing

BEFORE = {"losses": {"step 1": 0.5}, "params": {"kernel": np.float32([[1, 2]])}}


def test_equal():
    assert differing(BEFORE, {**BEFORE}) == []


@pytest.mark.parametrize(
    "kernel",
    [
        np.nextafter(np.float32([[1, 2]]), np.float32(9)),  # one unit in the last place
        np.float64([[1, 2]]),
        np.float32([1, 2]),
    ],
)
def test_a_bit_a_dtype_or_a_shape_differs(kernel):
    assert differing(BEFORE, BEFORE | {"params": {"kernel": kernel}}) == ["['params']['kernel']"]


def test_a_loss_is_missing():
    assert differing(BEFORE | {"losses": {}}, BEFORE) == ["['losses']['step 1']"]
