"""What an evaluator returns."""

from typing import NamedTuple

from vlmae.analysis.page import Item


class Result(NamedTuple):
    """Metrics, how sure they are, and what they are made of."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # 95 % bootstrap, of some of the metrics
    predictions: list[dict]  # one for each query, question or clip
    items: list[Item]  # the same, to be drawn
