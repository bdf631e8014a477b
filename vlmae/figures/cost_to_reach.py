"""Cost to reach a quality: runs of several lengths, paired by seed with those of a reference.

vlmae report DIR --cost-to-reach NAME
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.schema.checks import UserError
from vlmae.figures.sweep_plots import make_figure
from vlmae.runs.atomic_files import write_json, write_whole
from vlmae.runs.metric_registry import metric_of
from vlmae.runs.summary import COMPLETE, Run
from vlmae.runs.tables import markdown_table

# Quality of retrieval -> metrics whose mean it is. The first two tell models apart best.
RETRIEVAL = {
    label: tuple(f"retrieval/{direction}_{key}" for direction in ("t2v", "v2t"))
    for label, key in {
        "mean log rank": "mean_log_rank",
        "InfoNCE": "info_nce",
        "MRR": "mrr",
        "R@10": "r10",
    }.items()
}
COSTS = {"operations": "total_flops", "seconds": "total_secs"}
CostOf = Callable[[Run, str], float]  # (run, key of COSTS) -> its total
Curves = dict[str, dict[int, list[Run]]]  # name of a config -> seed -> runs, ascending in steps


class Reach(NamedTuple):
    """Cost of the reference's longest run over the cost of a method to reach its quality.

    None: no length reaches it. A method whose shortest run is good enough may be cheaper still.
    """

    method: str
    seed: int
    quality: str
    operations: float | None
    seconds: float | None


def total_cost(run: Run, name: str) -> float:
    """Return a total that the run has logged."""
    return getattr(run.cost, COSTS[name])


def write_reach(
    runs: Sequence[Run],
    reference: str,
    wanted: Sequence[str],
    out: Path,
    cost_of: CostOf = total_cost,
) -> list[str]:
    """Write cost_to_reach.md (a table), .json (a row for each method and seed) and .png.

    Args:
      runs: of several lengths, names and seeds; incomplete ones and trunks are left out.
      reference: name of the runs whose quality is to be reached.
      wanted: metrics; empty: those of retrieval, each the mean of both directions.
      out: folder to write to.
      cost_of: a run's total cost.

    Returns:
      The names of the files.

    Raises:
      UserError: see `decayed_curves`, `qualities_of` and `reach_all`.
    """
    curves = decayed_curves(runs)
    qualities = qualities_of(curves, wanted)
    reached = reach_all(curves, reference, qualities, cost_of)
    plot_curves(curves, *next(iter(qualities.items())), out / "cost_to_reach.png", cost_of)
    write_whole(out / "cost_to_reach.md", format_reach(reached, reference) + "\n")
    write_json(out / "cost_to_reach.json", rows_by_seed(reached))
    return [f"cost_to_reach.{ending}" for ending in ("md", "json", "png")]


def decayed_curves(runs: Sequence[Run]) -> Curves:
    """Arrange complete runs by the name of their config and by seed.

    Trunks are left out: at a learning rate that has not decayed a model is worse than it could be.

    Raises:
      UserError: two runs have the same name, seed and steps.
    """
    curves: Curves = {}
    for run in sorted(runs, key=lambda run: run.steps):
        fields = run.fields
        is_trunk = fields.get("optim.schedule") == "wsd" and not fields["optim.decay_share"]
        if run.state != COMPLETE or is_trunk:
            continue
        members = curves.setdefault(run.title, {}).setdefault(fields["seed"], [])
        if members and members[-1].steps == run.steps:
            raise UserError(
                f"{members[-1].name} and {run.name} have the same --name, --seed and "
                "--train.steps: curves of cost need different ones"
            )
        members.append(run)
    return curves


def qualities_of(curves: Curves, wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Choose the qualities: the metrics asked for, or those of retrieval.

    Raises:
      UserError: a run lacks a metric.
    """
    qualities = {name: (name,) for name in wanted} or RETRIEVAL
    metrics = [metric for names in qualities.values() for metric in names]
    for run in (run for seeds in curves.values() for runs in seeds.values() for run in runs):
        missing = [metric for metric in metrics if metric not in run.metrics]
        if missing:
            raise UserError(f"{run.name} has no {', '.join(missing)}: name others with --metric")
    return qualities


def quality_of(run: Run, metrics: Sequence[str]) -> float:
    """Return the mean of some metrics."""
    return float(np.mean([run.metrics[name] for name in metrics]))


def cost_at(
    target: float, costs: Sequence[float], values: Sequence[float], lower_is_better: bool
) -> float | None:
    """Interpolate the cost at which a curve first reaches a quality, in the logarithm of the cost.

    Args:
      target: the quality.
      costs: ascending, of runs of several lengths.
      values: their quality.
      lower_is_better: of the quality.

    Returns:
      The cost; that of the first run if it is good enough; None if no run is.

    >>> round(cost_at(2.5, [1, 4, 16], [3, 2, 1], lower_is_better=True), 6)
    2.0
    """
    sign = -1 if lower_is_better else 1
    scores = [sign * value for value in values]
    found = next((i for i, score in enumerate(scores) if score >= sign * target), None)
    if not found:
        return None if found is None else costs[0]
    part = (sign * target - scores[found - 1]) / (scores[found] - scores[found - 1])
    before, after = math.log(costs[found - 1]), math.log(costs[found])
    return math.exp(before + part * (after - before))


def reach_all(
    curves: Curves,
    reference: str,
    qualities: Mapping[str, Sequence[str]],
    cost_of: CostOf = total_cost,
) -> list[Reach]:
    """Compare each curve with the reference's longest run of the same seed.

    Raises:
      UserError: there is no run of that name.
    """
    if reference not in curves:
        raise UserError(
            f"--cost-to-reach {reference}: no complete run has that --name; there is: "
            f"{', '.join(curves) or 'none'}"
        )
    found = []
    for method, seeds in curves.items():
        for seed in seeds.keys() & curves[reference].keys():
            for quality, metrics in qualities.items():
                best = curves[reference][seed][-1]
                ratios = {}
                for cost in COSTS:
                    reached = cost_at(
                        quality_of(best, metrics),
                        [cost_of(run, cost) for run in seeds[seed]],
                        [quality_of(run, metrics) for run in seeds[seed]],
                        metric_of(metrics[0]).better == "lower",
                    )
                    ratios[cost] = None if reached is None else cost_of(best, cost) / reached
                found.append(Reach(method, seed, quality, **ratios))
    return sorted(found, key=lambda reach: (reach.method, reach.seed))


def rows_by_seed(reached: Sequence[Reach]) -> list[dict[str, Any]]:
    """Summarize a method and seed over the qualities: the geometric mean, or None if one is."""
    rows = []
    for method, seed in dict.fromkeys((reach.method, reach.seed) for reach in reached):
        own = [reach for reach in reached if (reach.method, reach.seed) == (method, seed)]
        row: dict[str, Any] = {"method": method, "seed": seed}
        for cost in COSTS:
            ratios = [getattr(reach, cost) for reach in own]
            known = None not in ratios
            row[f"cost_ratio_{cost}"] = float(np.exp(np.mean(np.log(ratios)))) if known else None
        rows.append(row)
    return rows


def format_reach(reached: Sequence[Reach], reference: str) -> str:
    """Make the table: for each method and quality, the lowest and highest ratio over the seeds."""
    qualities = list(dict.fromkeys(reach.quality for reach in reached))
    rows = [["method", "seeds", *(f"{cost}, {q}" for cost in COSTS for q in qualities)]]
    for method in dict.fromkeys(reach.method for reach in reached):
        own = [reach for reach in reached if reach.method == method]
        cells = [
            _range([getattr(reach, cost) for reach in own if reach.quality == quality])
            for cost in COSTS
            for quality in qualities
        ]
        rows.append([method, str(len({reach.seed for reach in own})), *cells])
    return (
        f"Cost of the longest run of {reference} over the cost to reach its quality: the lowest "
        "and the highest ratio over the seeds, which are paired. Between two lengths the logarithm "
        f"of the cost is interpolated.\n\n{markdown_table(rows)}"
    )


def _range(ratios: Sequence[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return "not reached"
    low, high = f"{min(known):.1f}", f"{max(known):.1f}"
    missed = len(ratios) - len(known)
    text = low if low == high else f"{low}-{high}"
    return f"{text} ({missed} of {len(ratios)} not reached)" if missed else text


def plot_curves(
    curves: Curves,
    quality: str,
    metrics: Sequence[str],
    path: Path,
    cost_of: CostOf = total_cost,
) -> None:
    """Draw quality against the total cost, a panel for each cost, a thin line for each seed."""
    figure, all_axes = make_figure(len(COSTS))
    labels = {"operations": "operations of the run", "seconds": "seconds of its steps"}
    better = metric_of(metrics[0]).better
    for axes, cost in zip(all_axes, COSTS, strict=True):
        for i, (method, seeds) in enumerate(curves.items()):
            for runs in seeds.values():
                xs = [cost_of(run, cost) for run in runs]
                ys = [quality_of(run, metrics) for run in runs]
                axes.plot(xs, ys, "os^Dv"[i % 5] + "-", color=f"C{i}", lw=1, ms=4, alpha=0.7)
            axes.plot([], [], "os^Dv"[i % 5] + "-", color=f"C{i}", label=method)
        axes.set(xscale="log", xlabel=labels[cost], ylabel=f"{quality}, {better} is better")
        if better == "lower":
            axes.invert_yaxis()
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
