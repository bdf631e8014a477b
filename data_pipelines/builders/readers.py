"""Annotation files as they are published: JSON, tables, lists, with errors that name the place.

A place is `FILE[INDEX]` for an entry of a JSON list (from 0) and `FILE:LINE` for a line (from 1).
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, which must be a `kind` (list or dict).

    Raises:
      ValueError: not JSON, or something else; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: must hold {_KINDS[kind]}")
    return content


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, entry) of a JSON file that holds a list.

    Raises:
      ValueError: the file holds no JSON list.
    """
    for index, entry in enumerate(read_json(path, list)):
        yield f"{path}[{index}]", entry


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of the lines of a text file that are not empty, without the blanks around."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", line.strip()


def read_table(
    path: Path,
    columns: Sequence[str],
    *,
    delimiter: str = ",",
    header: bool = True,
    quoted: bool = True,
) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a table.

    Args:
      path: a UTF-8 file.
      columns: those that every row must have; without a header all columns, in order.
      delimiter: what stands between two fields.
      header: whether the first line names the columns.
      quoted: whether quotation marks around a field are not part of it, as spreadsheets write.

    Raises:
      ValueError: a column is missing, or a row has too many fields or lacks a wanted one.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        names = None if header else columns
        rows = csv.DictReader(lines, names, delimiter=delimiter, quoting=quoting)
        missing = [name for name in columns if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}:1: column {missing[0]!r} is missing")
        for row in rows:
            place = f"{path}:{rows.line_num}"
            if None in row or any(row[name] is None for name in columns):
                raise ValueError(f"{place}: must have {len(rows.fieldnames)} fields")
            yield place, row


def field(entry: Any, name: str, kind: type, place: str) -> Any:
    """The field of a JSON object, of the wanted type.

    Raises:
      ValueError: no object, no such field, or another type; the message names place and field.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must be an object")
    if name not in entry:
        raise ValueError(f"{place}: field {name!r} is missing")
    if not isinstance(entry[name], kind) or isinstance(entry[name], bool):
        raise ValueError(f"{place}: field {name!r} must be {_KINDS[kind]}")
    return entry[name]


def texts_field(entry: Any, name: str, place: str) -> tuple[str, ...]:
    """A field that holds a text or a list of texts, as a tuple.

    Raises:
      ValueError: as `field`, or the list holds something else.
    """
    if isinstance(entry, dict) and isinstance(entry.get(name), str):
        return (entry[name],)
    texts = field(entry, name, list, place)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: field {name!r} must hold texts only")
    return tuple(texts)


def whole_number(row: dict[str, str], name: str, place: str, end: int) -> int:
    """A field of a table row as a number from 0 up to, not including, `end`.

    Raises:
      ValueError: it is not.
    """
    text = row[name].strip()
    if not text.isdecimal() or int(text) >= end:
        raise ValueError(f"{place}: field {name!r} must be one of 0 to {end - 1}, not {text!r}")
    return int(text)
