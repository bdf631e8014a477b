"""Report of a sweep, or of any work directories: tables, and plots of metrics against cost.

vlmae report DIR [--x mask.ratio] [--metric retrieval/t2v_r1] [--out DIR] [--cost-to-reach NAME]
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.schema.checks import UserError
from vlmae.figures.cost_to_reach import write_reach
from vlmae.figures.sweep_plots import (
    COSTS,
    comparable,
    numeric_fields,
    plot_against_cost,
    plot_against_field,
)
from vlmae.launching.sweep_plan import short_names
from vlmae.runs.atomic_files import write_whole
from vlmae.runs.metric_registry import MAIN_METRICS, metric_of
from vlmae.runs.result import Cost
from vlmae.runs.summary import (
    COMPLETE,
    DAMAGED,
    FAILED,
    UNFINISHED,
    Group,
    Run,
    differing_fields,
    find_runs,
    group_by_seed,
    value_of,
)
from vlmae.runs.tables import markdown_table

COST_HEADS = {  # column -> unit, heading
    "flops_per_clip": (1e9, "operations per clip (billion)"),
    "secs_per_clip": (1.0, "seconds per clip"),
    "total_flops": (1e12, "operations in all (10^12)"),
    "total_secs": (1.0, "seconds in all"),
}
NOTES = """\
Operations are those of the matrix products of the training step (in runs before
`speed/matrix_rate_share` was logged, XLA's count with elementwise work): per clip a mean over the
steps, in all times the clips seen. Seconds are those of the training loop without compilation and
evaluation: per clip the median over the log lines, in all their sum. Where batches of images and
clips alternate, a clip is either. Metrics of a run that is not complete are the last it logged.
"""


def report(
    directory: Path,
    x: tuple[str, ...] = (),
    metric: tuple[str, ...] = (),
    out: Path | None = None,
    cost_to_reach: str = "",
) -> None:
    """Write report.csv, report.md and plots about all runs in and below a folder.

    Args:
      directory: any folder with work directories in it, for example that of a sweep.
      x: fields to plot the metrics against; default every number that differs between the runs.
      metric: metrics to plot; they join the tables if they are not there anyway. By default
        the first main metric that the runs have, as retrieval/t2v_r1.
      out: where to write; default `directory`.
      cost_to_reach: name (`--name`) of runs whose quality the others are to reach: writes
        cost_to_reach.md, .json and .png too. Runs of one name are a curve of lengths; seeds are
        paired.

    Raises:
      UserError: no such folder, no run in it, or an unknown field or metric, or one that is not
        in `vlmae.runs.metric_registry`.
    """
    runs = find_runs(directory)
    fields = differing_fields(runs)
    groups = group_by_seed(runs)
    # Names are checked before anything is written.
    metrics = metric_columns(runs, metric)
    plotted = metric or metrics[:1]
    columns = (*metrics, *Cost._fields)
    x_fields = choose_fields(x, groups)
    out = out or directory
    out.mkdir(parents=True, exist_ok=True)
    # Plots first, so that a report never shows a picture that could not be drawn.
    plots = draw_plots(groups, x_fields, plotted, out)
    write_whole(out / "report.csv", format_csv(runs, fields, columns))
    write_whole(out / "report.md", format_report(runs, groups, fields, columns, plots))
    compared = write_reach(runs, cost_to_reach, metric, out) if cost_to_reach else []
    files = ", ".join(["report.csv", "report.md", *plots, *compared])
    print(f"{count_states(runs)}\nwritten to {out}: {files}")


def metric_columns(runs: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """Choose the metrics of the tables: main metrics that a run has, and those asked for.

    Raises:
      UserError: no run has a metric that was asked for.
    """
    known = {name for run in runs for name in run.metrics}
    for name in wanted:
        if name not in known:
            there_is = ", ".join(sorted(known)) or "none"
            raise UserError(f"no run has the metric {name}; there is: {there_is}")
    return [name for name in dict.fromkeys((*MAIN_METRICS, *wanted)) if name in known]


def choose_fields(wanted: Sequence[str], groups: Sequence[Group]) -> list[str]:
    """Choose the fields to plot against, by full or short names; by default all numbers.

    Raises:
      UserError: the complete runs do not differ in a field that was asked for.
    """
    if not wanted:
        return numeric_fields(groups)
    short = short_names(groups[0].fields if groups else ())
    by_name = {name: field for field, s in short.items() for name in (field, s)}
    for name in wanted:
        if name not in by_name:
            known = ", ".join(short) or "nothing"
            raise UserError(f"--x {name}: the complete runs do not differ in it, but in: {known}")
    return [by_name[name] for name in wanted]


def draw_plots(
    groups: Sequence[Group], fields: Sequence[str], metrics: Sequence[str], out: Path
) -> list[str]:
    """Draw the plots that the complete runs allow; return the names of the PNG files.

    Runs of other data or protocols have plots of their own; two groups make a plot.
    """
    if not metrics:
        return []
    names = []
    for field, short in short_names(fields).items():
        for name, members in plottable(groups, f"quality_vs_{short}", field):
            plot_against_field(members, field, metrics, out / name)
            names.append(f"{name}.png")
    for cost in COSTS:
        for name, members in plottable(groups, f"quality_vs_{cost}"):
            plot_against_cost(members, cost, metrics, out / name)
            names.append(f"{name}.png")
    return names


def plottable(
    groups: Sequence[Group], name: str, field: str = ""
) -> Iterator[tuple[str, list[Group]]]:
    """Yield the name of a file, without its ending, and the groups that may share its axes."""
    for shared, members in comparable(groups, field).items():
        points = {str(group.fields[field]) for group in members} if field else members
        if len(points) > 1:
            whole = "_".join(filter(None, [name, shared]))
            yield re.sub(r"[^A-Za-z0-9.=]+", "_", whole), members


def count_states(runs: Sequence[Run]) -> str:
    """Count the runs by state, and those that the plots leave out."""
    counts = Counter(run.state for run in runs)
    damaged = counts[DAMAGED]
    return (
        f"{len(runs)} runs: {counts[COMPLETE]} complete, {counts[UNFINISHED]} unfinished, "
        f"{counts[FAILED]} failed{f', {damaged} damaged' if damaged else ''}; "
        f"{len(runs) - counts[COMPLETE]} left out of the means and the plots"
    )


def format_csv(runs: Sequence[Run], fields: Sequence[str], columns: Sequence[str]) -> str:
    """Format one line a run, with full names and plain numbers (FLOPs, seconds)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *fields, "state", "step", "steps", "error", *columns])
    for run in runs:
        values = [value_of(run, column) for column in columns]
        # Empty, since spreadsheets read "nan" as text.
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
    """Format `report.md`."""
    pictures = "\n\n".join(f"![{name}]({name})" for name in plots)
    return "\n".join(
        [
            f"# Report\n\n{count_states(runs)}.\n\n{NOTES}",
            f"## Runs\n\n{runs_table(runs, fields, columns)}\n",
            "## Over seeds\n\nComplete runs that are equal except for the seed: mean ± sample "
            f"standard deviation.\n\n{groups_table(groups, columns)}\n",
            f"## Plots\n\n{pictures or 'No two complete runs have the metric: nothing to plot.'}\n",
        ]
    )


def runs_table(runs: Sequence[Run], fields: Sequence[str], columns: Sequence[str]) -> str:
    """Make a row for each run: differing fields, state, metrics and cost."""
    short = short_names(fields)
    rows = [["run", *short.values(), "state", *map(heading, columns)]]
    for run in runs:
        config = [str(run.fields.get(field, "")) for field in fields]
        numbers = [format_number(value_of(run, column), column) for column in columns]
        rows.append([run.name, *config, describe_state(run), *numbers])
    return markdown_table(rows)


def groups_table(groups: Sequence[Group], columns: Sequence[str]) -> str:
    """Make a row for each group: differing fields, seeds, means with standard deviations."""
    fields = list(groups[0].fields) if groups else []
    rows = [[*short_names(fields).values(), "n", *map(heading, columns)]]
    for group in groups:
        config = [str(group.fields[field]) for field in fields]
        rows.append([*config, str(len(group.runs))])
        for column in columns:
            mean, std = (format_number(value, column) for value in group.mean_std(column))
            rows[-1].append(f"{mean} ± {std}" if std else mean)  # no deviation of one run
    return markdown_table(rows)


def describe_state(run: Run) -> str:
    """Describe a run's state, as in "failed at step 4 of 8: the error"."""
    if run.state == COMPLETE:
        return f"complete, step {run.step}"
    at = f" at step {run.step} of {run.steps}" if run.steps else ""
    return f"{run.state}{at}" + (f": {run.error}" if run.error else "")


def heading(column: str) -> str:
    """Name a column of report.md, with its unit."""
    return COST_HEADS[column][1] if column in COST_HEADS else metric_of(column).title


def format_number(value: float, column: str) -> str:
    """Format a metric with its decimals, a cost with three digits in its unit; "" for NaN."""
    if math.isnan(value):
        return ""
    if column in COST_HEADS:
        value /= COST_HEADS[column][0]
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:.{metric_of(column).decimals}f}"
