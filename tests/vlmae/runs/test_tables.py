"""Markdown tables: bars and line breaks in a cell do not break the table."""

import pytest

from vlmae.runs.tables import align, markdown_table


def test_rows_and_cells():
    rows = [("", "R@1"), ("a | b", 12.5), ("two\nlines", "")]
    assert markdown_table(rows).splitlines() == [
        "| | R@1 |",
        "|---|---|",
        "| a / b | 12.5 |",
        "| two lines | |",
    ]


def test_rows_of_another_length_are_an_error():
    with pytest.raises(ValueError, match="cells in one table"):
        markdown_table([("a", "b"), ("c",)])


def test_text_of_others_is_shown_and_not_obeyed():
    """Errors and names of files come from anywhere: HTML stays text, and so do control codes."""
    assert "| &lt;img src=x onerror=y&gt; |" in markdown_table([("a",), ("<img src=x onerror=y>",)])
    assert "\x1b" not in markdown_table([("a",), ("\x1b[2J",)])
    assert align([("run\n2", "\x1b[2J\u202e")]) == "run 2  \\x1b[2J\\u202e"
