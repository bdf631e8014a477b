"""Plots of a sweep: metrics against a config field and against cost, averaged over seeds."""

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmae.launching.sweep_plan import short_names
from vlmae.runs.metric_registry import metric_of
from vlmae.runs.summary import Group, pareto_front

AXES_INCHES = (6.0, 4.2)
LINE_INCHES, GAP_INCHES = 0.16, 0.07  # of a legend
FORMATS = ("png", "pdf")  # the second for papers
BASE = "base"  # label of runs that have the values of most runs
# Runs that differ in one of these answer other questions: other data, or another protocol.
PROTOCOL = re.compile(r"data\.(eval|train\.\d+)\.(name|split)|data\.(task|classes)|evaluation\.\w+")
COSTS = {  # file name -> column, its unit, label
    "operations": ("flops_per_clip", 1e9, "operations per clip in training (billion)"),
    "seconds": ("secs_per_clip", 1.0, "seconds per clip in training"),
}


def numeric_fields(groups: Sequence[Group]) -> list[str]:
    """List the fields that are numbers in all groups and differ between them."""
    names = list(groups[0].fields) if groups else []
    columns = {name: [group.fields[name] for group in groups] for name in names}
    return [n for n, c in columns.items() if all(map(is_number, c)) and len(set(c)) > 1]


def is_number(value: Any) -> bool:
    """Return True for int and float, but not for bool, which is an int to Python."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def in_short(fields: Mapping[str, Any]) -> str:
    """Format fields with their values in short: "mask.ratio=0.75, depth=4"."""
    short = short_names(fields)
    return ", ".join(f"{short[k]}={v}" for k, v in fields.items())


def group_labels(groups: Sequence[Group], without: str = "") -> list[str]:
    """Format of each group the fields whose values are not those of most groups.

    A group that has the values of most groups in all fields is "base". Where no value is that of
    more than half of the groups, all of them are named.

    Args:
      groups: with the same fields.
      without: field to leave out, because it is an axis.
    """
    usual = {}
    for name in groups[0].fields if groups else ():
        [(value, count)] = Counter(str(x.fields[name]) for x in groups).most_common(1)
        if 2 * count > len(groups):
            usual[name] = value
    labels = []
    for group in groups:
        own = {k: v for k, v in group.fields.items() if k != without and usual.get(k) != str(v)}
        has_others = any(k != without for k in group.fields)
        labels.append(in_short(own) or (BASE if has_others else ""))
    return labels


def comparable(groups: Sequence[Group], field: str = "") -> dict[str, list[Group]]:
    """Part the groups by data and protocol, without the fields that say so.

    Args:
      groups: see `plot_against_cost`.
      field: one that may differ all the same, because it is an axis.

    Returns:
      Those that may share axes, by what they have in common: "eval.split=test".
    """
    parts: dict[str, list[Group]] = {}
    for group in groups:
        fixed = {k: v for k, v in group.fields.items() if PROTOCOL.fullmatch(k) and k != field}
        free = {k: v for k, v in group.fields.items() if k not in fixed}
        parts.setdefault(in_short(fixed), []).append(Group(free, group.runs))
    return parts


def chance_levels(groups: Sequence[Group], metric: str) -> list[float]:
    """Return the chance levels of a metric, rounded: one, unless the runs had other test sets."""
    chance = metric_of(metric).chance
    values = [run.metrics.get(chance) for group in groups for run in group.runs]
    # Rounded: chance is computed in floating point, and each value would be a line of its own.
    return sorted({round(value, 6) for value in values if value is not None})


def plot_against_field(
    groups: Sequence[Group], field: str, metrics: Sequence[str], path: Path
) -> None:
    """Draw metrics against a field: means with standard deviations over the seeds.

    Groups that differ in other fields too are drawn as a line for each combination of those.

    Args:
      groups: complete runs that are equal except for the seed.
      field: config field of the horizontal axis, a number or a name.
      metrics: one panel each.
      path: the images to write, without an ending.
    """
    series: dict[str, list[Group]] = {}
    for label, group in zip(group_labels(groups, without=field), groups, strict=True):
        # A line for each setting of the other fields: joined, they would zigzag.
        series.setdefault(label, []).append(group)
    xs = [group.fields[field] for group in groups]
    # Anything but numbers becomes names, evenly spaced.
    place = (lambda x: x) if all(map(is_number, xs)) else str
    figure, all_axes = make_figure(len(metrics))
    for axes, metric in zip(all_axes, metrics, strict=True):
        for label, members in series.items():
            mean, std = _columns(members, metric)
            x = [place(group.fields[field]) for group in members]
            axes.errorbar(x, mean, yerr=std, marker="o", capsize=3, label=label)
        _draw_chance(axes, groups, metric)
        axes.set(xlabel=field, ylabel=_y_label(metric))
    _add_legend(figure, _labeled(all_axes))
    _save(figure, path)


def plot_against_cost(
    groups: Sequence[Group], cost: str, metrics: Sequence[str], path: Path
) -> None:
    """Draw metrics against cost, with the Pareto front.

    Args:
      groups: complete runs that are equal except for the seed.
      cost: a key of `COSTS`.
      metrics: one panel each.
      path: the images to write, without an ending.
    """
    column, unit, label = COSTS[cost]
    x, x_std = (values / unit for values in _columns(groups, column))
    figure, all_axes = make_figure(len(metrics))
    for axes, metric in zip(all_axes, metrics, strict=True):
        y, y_std = _columns(groups, metric)
        better = metric_of(metric).better
        if better != "neither":
            # The sign turns metrics of which less is better.
            front = pareto_front(x, -y if better == "lower" else y)
            axes.plot(x[front], y[front], color="0.7", zorder=1, label="Pareto front")
        _draw_chance(axes, groups, metric)
        lines = _labeled(all_axes)  # before the points, whose names stand first
        points = [
            # A new marker each time the ten colors repeat.
            axes.errorbar(x[i], y[i], y_std[i], x_std[i], "os^Dv"[i // 10 % 5], capsize=3)
            for i in range(len(groups))
        ]
        axes.set(xlabel=label, ylabel=_y_label(metric))
    named = [*zip(group_labels(groups), points, strict=True)]
    _add_legend(figure, [*named, *lines])
    _save(figure, path)


def _labeled(all_axes: Sequence[Any]) -> list[tuple[str, Any]]:
    """List what is drawn under a name in any of the axes, each name once."""
    found: dict[str, Any] = {}
    for axes in all_axes:
        handles, names = axes.get_legend_handles_labels()
        found = dict(zip(names, handles, strict=True)) | found
    return [(name, handle) for name, handle in found.items() if name]


def _add_legend(figure: Any, named: Sequence[tuple[str, Any]]) -> None:
    """Put one legend below all axes, where long names cover no point."""
    if named:
        width = 80 * len(figure.axes)
        names = [textwrap.fill(name, width) for name, _ in named]
        handles = [handle for _, handle in named]
        lines = sum(name.count("\n") + 1 for name in names)
        # As high as the legend needs: in a fixed height many long names would cover the axes.
        figure.set_figheight(AXES_INCHES[1] + LINE_INCHES * (lines + 1) + GAP_INCHES * len(names))
        figure.legend(handles, names, loc="outside lower center", fontsize=9, frameon=False)


def _save(figure: Any, path: Path) -> None:
    for ending in FORMATS:
        figure.savefig(path.with_name(f"{path.name}.{ending}"), dpi=150)


def _y_label(metric: str) -> str:
    described = metric_of(metric)
    return described.title + (", lower is better" if described.better == "lower" else "")


def _columns(groups: Sequence[Group], column: str) -> tuple[np.ndarray, np.ndarray]:
    means, stds = zip(*(group.mean_std(column) for group in groups), strict=True)
    return np.array(means), np.array(stds)


def _draw_chance(axes: Any, groups: Sequence[Group], metric: str) -> None:
    for level in chance_levels(groups, metric):
        axes.axhline(level, color="0.5", linestyle="--", linewidth=1, label=f"chance: {level:.1f}")


def make_figure(columns: int) -> tuple[Any, list]:
    """Make a figure with axes in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = AXES_INCHES
    # Agg and no pyplot, which would look for a display and keep every figure in memory.
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes
