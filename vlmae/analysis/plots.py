"""Plots of a sweep: quality against a field of the config, and against cost, over seeds."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmae.analysis.runs import Group, lower_is_better, pareto_front
from vlmae.sweep import short_names

AXES_INCHES = (6.0, 4.2)
COSTS = {  # file name -> column, its unit, label
    "operations": ("flops_per_clip", 1e9, "operations per clip in training (billion)"),
    "seconds": ("secs_per_clip", 1.0, "seconds per clip in training"),
}


def numeric_fields(groups: Sequence[Group]) -> list[str]:
    """Fields that are numbers in all groups and not the same in all."""
    names = [name for name in groups[0].fields] if groups else []
    columns = {name: [group.fields[name] for group in groups] for name in names}
    return [n for n, c in columns.items() if all(map(is_number, c)) and len(set(c)) > 1]


def is_number(value: Any) -> bool:
    """True for int and float; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def metric_label(metric: str) -> str:
    """What a reader calls a metric: "retrieval/t2v_r1" -> "text to video R@1 (%)"."""
    name = metric.removeprefix("retrieval/")
    for short, words in (("t2v_", "text to video "), ("v2t_", "video to text ")):
        name = name.replace(short, words)
    head, _, last = name.rpartition(" ")
    is_recall = last.startswith("r") and last[1:].isdigit()
    return f"{head} R@{last[1:]} (%)" if is_recall else name.replace("_", " ")


def group_label(group: Group, without: str = "") -> str:
    """The fields of a group in few words: "mask.ratio=0.75, depth=4"."""
    short = short_names(group.fields)
    return ", ".join(f"{short[k]}={v}" for k, v in group.fields.items() if k != without)


def chance_levels(groups: Sequence[Group], metric: str) -> list[float]:
    """The levels of chance of a recall, rounded: one, unless the runs had other test sets."""
    kind, _, recall = metric.rpartition("_")
    runs = [run for group in groups for run in group.runs]
    values = [run.metrics.get(f"{kind}_chance_{recall}") for run in runs]
    return sorted({round(value, 6) for value in values if value is not None})


def plot_against_field(
    groups: Sequence[Group], field: str, metrics: Sequence[str], path: Path
) -> None:
    """Draws each metric against a field: means with standard deviations over the seeds.

    Groups that differ in other fields as well make a line for each combination of those.
    """
    series: dict[str, list[Group]] = {}
    for group in groups:
        series.setdefault(group_label(group, without=field), []).append(group)
    xs = [group.fields[field] for group in groups]
    place = (lambda x: x) if all(map(is_number, xs)) else str
    figure, all_axes = _figure(len(metrics))
    for axes, metric in zip(all_axes, metrics, strict=True):
        for label, members in series.items():
            mean, std = _columns(members, metric)
            x = [place(group.fields[field]) for group in members]
            axes.errorbar(x, mean, yerr=std, marker="o", capsize=3, label=label)
        _draw_chance(axes, groups, metric)
        axes.set(xlabel=field, ylabel=_y_label(metric))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def plot_against_cost(
    groups: Sequence[Group], cost: str, metrics: Sequence[str], path: Path
) -> None:
    """Draws each metric against "operations" or "seconds", with the Pareto front."""
    column, unit, label = COSTS[cost]
    x, x_std = (values / unit for values in _columns(groups, column))
    figure, all_axes = _figure(len(metrics))
    for axes, metric in zip(all_axes, metrics, strict=True):
        y, y_std = _columns(groups, metric)
        front = pareto_front(x, -y if lower_is_better(metric) else y)
        axes.plot(x[front], y[front], color="0.7", zorder=1, label="Pareto front")
        _draw_chance(axes, groups, metric)
        axes.legend(fontsize=8, frameon=False)
        points = [
            axes.errorbar(x[i], y[i], y_std[i], x_std[i], _marker(i), capsize=3)
            for i in range(len(groups))
        ]
        axes.set(xlabel=label, ylabel=_y_label(metric))
    # Below the axes, where long names cover no point.
    names = [textwrap.fill(group_label(group), 80 * len(metrics)) for group in groups]
    figure.legend(points, names, loc="outside lower center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _marker(index: int) -> str:
    """A marker for each point; another one when the colors begin again."""
    return "os^Dv"[index // 10 % 5]


def _y_label(metric: str) -> str:
    return metric_label(metric) + (", lower is better" if lower_is_better(metric) else "")


def _columns(groups: Sequence[Group], column: str) -> tuple[np.ndarray, np.ndarray]:
    means, stds = zip(*(group.mean_std(column) for group in groups), strict=True)
    return np.array(means), np.array(stds)


def _draw_chance(axes: Any, groups: Sequence[Group], metric: str) -> None:
    for level in chance_levels(groups, metric):
        axes.axhline(level, color="0.5", linestyle="--", linewidth=1, label=f"chance: {level:.1f}")


def _figure(columns: int) -> tuple[Any, list]:
    """A figure that is drawn by Agg, without any window, and its axes in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = AXES_INCHES
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes
