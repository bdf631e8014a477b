"""Annotation files as they are published: JSON, tables, lists, with errors that name the place.

A place is `FILE[INDEX]` for an entry of a JSON list (from 0) and `FILE:LINE` for a line (from 1).
Text is UTF-8, with or without a byte-order mark.
"""

import codecs
import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.json_files import KINDS, parse_json

SEPARATORS = (",", "\t", ";", "|")
_MOST_LINES = 100  # of one row; captions with line breaks have a few


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, with their ends.

    Raises:
      UserError: a line in another encoding; the message names file and line.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                # The mark that spreadsheets write would become part of the first column's name.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                utf16 = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                raise UserError(
                    f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line); convert it, "
                    f"say with iconv -f {'utf-16' if utf16 else 'latin1'} -t utf-8"
                ) from error


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file, which must hold a `kind` (list or dict).

    Raises:
      UserError: not UTF-8, not JSON, or something else; the message names the file.
    """
    # By lines, since a message then names the line that is no UTF-8.
    content = parse_json("".join(text_lines(path)), path)
    check(isinstance(content, kind), f"{path}: must hold {KINDS[kind]}")
    return content


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, entry) of a JSON file that holds a list.

    Raises:
      UserError: the file holds no JSON list.
    """
    for index, entry in enumerate(read_json(path, list)):
        yield f"{path}[{index}]", entry


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, line) of the lines that are not empty, without the blanks around."""
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, entry) of a file with JSON in each line.

    Raises:
      UserError: a line is not JSON; the message names it.
    """
    for place, line in read_lines(path):
        yield place, parse_json(line, place)


def read_table(
    path: Path,
    columns: Sequence[str] = (),
    *,
    delimiter: str = ",",
    header: bool = True,
    quoted: bool = True,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) of a table.

    Args:
      path: a UTF-8 file.
      columns: those that every row must have; without a header all columns, in order.
      delimiter: between two fields. With a header, another of `SEPARATORS` is found by itself.
      header: whether the first line names the columns.
      quoted: whether quotation marks around a field are not part of it, as spreadsheets write.

    Raises:
      UserError: a column is missing, a row has too many fields or lacks a wanted one, or a
        quotation mark is not closed.
    """
    lines = text_lines(path)
    if header:
        first = next(lines, "")
        delimiter = find_separator(first, columns, delimiter)
        lines = itertools.chain([first], lines)
    # Without quoting a lone " in a caption would swallow the lines up to the next one.
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.DictReader(lines, None if header else columns, delimiter=delimiter, quoting=quoting)
    missing = [name for name in columns if name not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"{path}:1: column {missing[0]!r} is missing")
    for place, row in _checked_rows(path, rows):
        if None in row or any(row[name] is None for name in columns):
            raise UserError(f"{place}: must have {len(rows.fieldnames)} fields")
        yield place, row


def find_separator(header: str, columns: Sequence[str] = (), usual: str = ",") -> str:
    r"""Return the separator by which a header has the columns, or the most fields.

    >>> find_separator("key;video_id;sentence", ["video_id"]), find_separator("a\tb,c\td")
    (';', '\t')
    """
    names = {mark: next(csv.reader([header], delimiter=mark), []) for mark in (usual, *SEPARATORS)}
    # Known columns decide; counting fields could be misled by commas in a caption.
    if columns:
        return next((mark for mark in names if set(columns) <= set(names[mark])), usual)
    return max(names, key=lambda mark: len(names[mark]))


def _checked_rows(path: Path, rows: csv.DictReader) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row); a row of very many lines lacks a quotation mark."""
    while True:
        start = rows.line_num + 1
        try:
            row = next(rows, None)
            endless = rows.line_num - start > _MOST_LINES
        except csv.Error:  # a field of more than 131,072 characters
            endless = True
        if endless:
            raise UserError(f"{path}:{start}: a field does not end; is a quotation mark missing?")
        if row is None:
            return
        yield f"{path}:{rows.line_num}", row


def field(entry: Any, name: str, kind: type, place: str) -> Any:
    """Return the field of a JSON object, of the wanted type.

    Raises:
      UserError: no object, no such field, or another type; the message names place and field.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{place}: must be an object")
    if name not in entry:
        raise UserError(f"{place}: field {name!r} is missing")
    # True is an int to Python, but no number in a file.
    if not isinstance(entry[name], kind) or isinstance(entry[name], bool):
        raise UserError(f"{place}: field {name!r} must be {KINDS[kind]}")
    return entry[name]


def texts_field(entry: Any, name: str, place: str) -> tuple[str, ...]:
    """Return a field that holds a text or a list of texts, as a tuple.

    Raises:
      UserError: as `field`, or the list holds something else.
    """
    if isinstance(entry, dict) and isinstance(entry.get(name), str):
        return (entry[name],)
    texts = field(entry, name, list, place)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: field {name!r} must hold texts only")
    return tuple(texts)


def whole_number(row: dict[str, str], name: str, place: str, end: int) -> int:
    """Return a field of a table row as a number from 0 up to, not including, `end`.

    Raises:
      UserError: it is not.
    """
    text = row[name].strip()
    if not text.isdecimal() or int(text) >= end:
        raise UserError(f"{place}: field {name!r} must be one of 0 to {end - 1}, not {text!r}")
    return int(text)
