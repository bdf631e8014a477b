"""Cells of grid masks. Imports no jax: the config checks its ratio by them."""

import math


def grid_cell(ratio: float) -> int:
    """Return the side s of the cells of a grid mask, where ratio = 1 - 1/s^2, rounded or not.

    >>> grid_cell(0.75), grid_cell(0.8889), grid_cell(0.888), grid_cell(8 / 9)
    (2, 3, 3, 3)
    """
    return round(1 / math.sqrt(1 - ratio))
