"""Result of an evaluator."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from vlmae.evaluation.intervals import Interval
from vlmae.figures.answer_page import Item


class Result(NamedTuple):
    """Metrics of an evaluator, their confidence intervals, and its predictions."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]  # 95 %, of some of the metrics
    predictions: list[dict]  # one for each query, question or clip
    items: list[Item]  # the same predictions, to be drawn
    facts: Mapping[str, str] = MappingProxyType({})
    """Words about how metrics were computed, by name."""
