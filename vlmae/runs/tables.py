"""Tables: Markdown for reports, aligned columns for the terminal."""

import html
from collections.abc import Sequence

from data_pipelines.schema.checks import visible


def align(rows: Sequence[Sequence[str]]) -> str:
    """Pad all columns but the last to their widest cell, for a terminal.

    >>> print(align([("run", "state"), ("seed=1", "complete")]))
    run     state
    seed=1  complete
    """
    rows = [[visible(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Sequence[Sequence[object]]) -> str:
    """Format rows as a Markdown table; the first row is the heading.

    Raises:
      ValueError: a row has another number of cells than the heading.

    >>> print(markdown_table([["metric", "value"], ["R@1", 12.5]]))
    | metric | value |
    |---|---|
    | R@1 | 12.5 |
    """
    width = len(rows[0])
    if any(len(row) != width for row in rows):
        raise ValueError(f"rows of {sorted({len(row) for row in rows})} cells in one table")
    cells = [[_cell(str(cell)) for cell in row] for row in rows]
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * width, *lines[1:]])


def _cell(text: str) -> str:
    # Error messages and names of others stand in cells too: a bar would end the cell, a line break
    # the table, and browsers would run HTML.
    return html.escape(visible(text).replace("|", "/").replace("\n", " "), quote=False)
