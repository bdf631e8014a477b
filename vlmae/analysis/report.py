"""Any set of work directories as one table, with plots of quality against what was varied and cost.

python -m vlmae.analysis.report DIR [--x mask.ratio] [--metric retrieval/t2v_r1] [--out DIR]
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vlmae.analysis.plots import (
    COSTS,
    metric_label,
    numeric_fields,
    plot_against_cost,
    plot_against_field,
)
from vlmae.analysis.runs import (
    COMPLETE,
    FAILED,
    UNFINISHED,
    Group,
    Run,
    differing_fields,
    find_runs,
    group_by_seed,
    value_of,
)
from vlmae.command import run_command
from vlmae.files import write_whole
from vlmae.result import Cost
from vlmae.sweep import short_names

QUALITY = tuple(
    f"retrieval/{direction}_{name}"
    for direction in ("t2v", "v2t")
    for name in ("r1", "r5", "r10", "median_rank")
)
COST_HEADS = {  # column -> unit, heading
    "flops_per_clip": (1e9, "operations per clip (billion)"),
    "secs_per_clip": (1.0, "seconds per clip"),
    "total_flops": (1e12, "operations in all (10^12)"),
    "total_secs": (1.0, "seconds in all"),
}
NOTES = """\
Operations are those of the matrix products of the training step, counted by formula (by XLA in runs
before `speed/matrix_rate_share` was logged, elementwise work included): per clip a mean over the
steps, in all times the clips seen. Seconds are those of the training loop without compilation and
evaluation: per clip the median over the log lines, in all their sum. Where batches of images and
clips alternate, a clip is either. Metrics of a run that is not complete are the last it logged.
"""


def report(
    directory: Path,
    x: tuple[str, ...] = (),
    metric: tuple[str, ...] = (),
    out: Path | None = None,
) -> None:
    """Writes report.csv, report.md and plots about all runs in and below a folder.

    Args:
      directory: any folder with work directories in it, for example that of a sweep.
      x: fields to plot the metrics against; default every number that differs between the runs.
      metric: metrics to plot; they join the tables if they are not there anyway. By default
        retrieval/t2v_r1, if there is any.
      out: where to write; default `directory`.

    Raises:
      ValueError: no such folder, no run in it, or an unknown field or metric.
    """
    runs = find_runs(directory)
    fields = differing_fields(runs)
    groups = group_by_seed(runs)
    metrics = metric_columns(runs, metric)
    plotted = metric or [name for name in QUALITY[:1] if name in metrics]
    columns = (*metrics, *Cost._fields)
    x_fields = choose_fields(x, groups)
    out = out or directory
    out.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(groups, x_fields, plotted, out)
    write_whole(out / "report.csv", format_csv(runs, fields, columns))
    write_whole(out / "report.md", format_report(runs, groups, fields, columns, plots))
    print(
        f"{count_states(runs)}\nwritten to {out}: {', '.join(['report.csv', 'report.md', *plots])}"
    )


def metric_columns(runs: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """The metrics of the tables: the usual ones that any run has, and those asked for.

    Raises:
      ValueError: no run has a metric that was asked for.
    """
    known = {name for run in runs for name in run.metrics}
    for name in wanted:
        if name not in known:
            there_is = ", ".join(sorted(known)) or "none"
            raise ValueError(f"no run has the metric {name}; there is: {there_is}")
    return [name for name in dict.fromkeys((*QUALITY, *wanted)) if name in known]


def choose_fields(wanted: Sequence[str], groups: Sequence[Group]) -> list[str]:
    """The fields to plot against, by full or short names; all numbers that differ by default.

    Raises:
      ValueError: the complete runs do not differ in a field that was asked for.
    """
    if not wanted:
        return numeric_fields(groups)
    short = short_names(groups[0].fields if groups else ())
    by_name = {name: field for field, s in short.items() for name in (field, s)}
    for name in wanted:
        if name not in by_name:
            known = ", ".join(short) or "nothing"
            raise ValueError(f"--x {name}: the complete runs do not differ in it, but in: {known}")
    return [by_name[name] for name in wanted]


def draw_plots(
    groups: Sequence[Group], fields: Sequence[str], metrics: Sequence[str], out: Path
) -> list[str]:
    """Draws everything that the complete runs allow; returns the names of the files."""
    if not (groups and metrics):
        return []
    names = []
    for field, short in short_names(fields).items():
        names.append(f"quality_vs_{re.sub(r'[^A-Za-z0-9.]', '_', short)}.png")
        plot_against_field(groups, field, metrics, out / names[-1])
    for cost in COSTS:
        names.append(f"quality_vs_{cost}.png")
        plot_against_cost(groups, cost, metrics, out / names[-1])
    return names


def count_states(runs: Sequence[Run]) -> str:
    """How many runs there are, and how many the plots leave out."""
    counts = Counter(run.state for run in runs)
    left_out = counts[UNFINISHED] + counts[FAILED]
    return (
        f"{len(runs)} runs: {counts[COMPLETE]} complete, {counts[UNFINISHED]} unfinished, "
        f"{counts[FAILED]} failed; {left_out} left out of the means and the plots"
    )


def format_csv(runs: Sequence[Run], fields: Sequence[str], columns: Sequence[str]) -> str:
    """One line a run, with full names and plain numbers (operations, seconds)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *fields, "state", "step", "steps", "error", *columns])
    for run in runs:
        values = [value_of(run, column) for column in columns]
        numbers = ["" if math.isnan(value) else value for value in values]
        config = [run.fields.get(field, "") for field in fields]
        writer.writerow([run.name, *config, run.state, run.step, run.steps, run.error, *numbers])
    return text.getvalue()


def format_report(
    runs: Sequence[Run],
    groups: Sequence[Group],
    fields: Sequence[str],
    columns: Sequence[str],
    plots: Sequence[str],
) -> str:
    """The whole of `report.md`."""
    pictures = "\n\n".join(f"![{name}]({name})" for name in plots)
    return "\n".join(
        [
            f"# Report\n\n{count_states(runs)}.\n\n{NOTES}",
            f"## Runs\n\n{runs_table(runs, fields, columns)}\n",
            "## Over seeds\n\nComplete runs that are equal except for the seed: mean ± sample "
            f"standard deviation.\n\n{groups_table(groups, columns)}\n",
            f"## Plots\n\n{pictures or 'No complete run has the metric: nothing to plot.'}\n",
        ]
    )


def runs_table(runs: Sequence[Run], fields: Sequence[str], columns: Sequence[str]) -> str:
    """One row a run: what differs, its state, its metrics and its cost."""
    short = short_names(fields)
    rows = [["run", *short.values(), "state", *map(heading, columns)]]
    for run in runs:
        config = [str(run.fields.get(field, "")) for field in fields]
        numbers = [format_number(value_of(run, column), column) for column in columns]
        rows.append([run.name, *config, describe_state(run), *numbers])
    return markdown(rows)


def groups_table(groups: Sequence[Group], columns: Sequence[str]) -> str:
    """One row a group: what differs, how many seeds, means with standard deviations."""
    fields = list(groups[0].fields) if groups else []
    rows = [[*short_names(fields).values(), "n", *map(heading, columns)]]
    for group in groups:
        config = [str(group.fields[field]) for field in fields]
        rows.append([*config, str(len(group.runs)), *(_mean_std(group, c) for c in columns)])
    return markdown(rows)


def _mean_std(group: Group, column: str) -> str:
    mean, std = (format_number(value, column) for value in group.mean_std(column))
    return f"{mean} ± {std}" if std else mean


def describe_state(run: Run) -> str:
    """ "complete", "unfinished at step 4 of 8" or "failed at step 4 of 8: the error"."""
    if run.state == COMPLETE:
        return f"complete, step {run.step}"
    at = f" at step {run.step} of {run.steps}" if run.steps else ""
    return f"{run.state}{at}" + (f": {run.error}" if run.error else "")


def heading(column: str) -> str:
    """What a column is called in report.md, with its unit."""
    return COST_HEADS[column][1] if column in COST_HEADS else metric_label(column)


def format_number(value: float, column: str) -> str:
    """A metric with one or three decimals, a cost with three digits in its unit; "" for NaN."""
    if math.isnan(value):
        return ""
    if column in COST_HEADS:
        value /= COST_HEADS[column][0]
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:.1f}" if column.startswith("retrieval/") else f"{value:.3f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the heading."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    run_command(report)
