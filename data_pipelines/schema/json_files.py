"""The one reader of JSON: whatever is wrong with a file becomes a line that names file and field.

Configs, records of runs, manifests, annotations, tokenizers and indices are read here.
"""

import dataclasses
import json
import re
import typing
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.schema.checks import MissingError, UserError, check
from data_pipelines.schema.fields import (
    UNIONS,
    bare,
    check_config,
    check_value,
    checks_deferred,
    elements,
    field_types,
    flag,
    join,
    optional,
    shown,
)

KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_FLAG = re.compile(r"--(?=[a-z])([a-z0-9._-]+)")

T = TypeVar("T")


def parse_json(text: str | bytes, place: str | PathLike, *, keep_halves: bool = False) -> Any:
    """Parse JSON; half of a cut emoji, which no file can hold, becomes a question mark.

    Args:
      text: UTF-8, with or without a byte-order mark, if it is given as bytes.
      place: of the text, a file or `FILE:LINE`; messages begin with it.
      keep_halves: keep those half pairs, by which Python writes file names that are no UTF-8.

    Raises:
      UserError: not JSON, or too deeply nested.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        content = json.loads(text)
        # Searched in the text: only then is it worth to go through the content again.
        if not keep_halves and _HALF_PAIR.search(text):
            content = json.loads(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))
    except RecursionError:
        raise UserError(f"{place}: not JSON: nested too deeply") from None
    except ValueError as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
        raise UserError(f"{place}: not JSON: {error}") from error
    return content


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte-order mark.

    Raises:
      MissingError: there is no such file.
      UserError: it cannot be read, or is no UTF-8; names it.
    """
    try:
        return path.read_text("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON file, which must hold a `kind`: dict, list, or object for any.

    Raises:
      MissingError: there is no such file.
      UserError: it cannot be read, is not JSON, or holds something else; names it.
    """
    content = parse_json(read_text(path), path)
    check(isinstance(content, kind), f"{path}: must hold {KINDS.get(kind, 'JSON')}")
    return content


def read_record(kind: type[T], path: Path) -> T:
    """Read a dataclass from a JSON file, its types checked like those of a config.

    Raises: as `read_json`, and UserError for a field that is missing, unknown or of another type.
    """
    return to_record(kind, read_json(path), path)


def to_record(kind: type[T], value: Any, place: str | PathLike) -> T:
    """Build a dataclass from parsed JSON; the place begins the messages of errors.

    Raises:
      UserError: a field is missing, unknown or of another type.
    """
    try:
        return from_dict(kind, value)
    except UserError as error:  # which names fields as flags of a command line
        message = _FLAG.sub(lambda found: found[1].replace("-", "_"), str(error))
        raise UserError(f"{place}: {message}") from None


def from_dict(kind: Any, value: Any, path: str = "") -> Any:
    """Build a config from JSON (dicts, lists and plain values), and check it as a whole.

    Args:
      kind: the config's class.
      value: as `json.loads` gives it; fields that it leaves out keep their defaults.
      path: of the config inside a larger one, see `check_config`.

    Raises:
      UserError: a field is unknown, missing, or its value is refused; names it.
    """
    # A part does not know its path: checked on its own, it would name --ratio for
    # --model.video.mask.ratio.
    with checks_deferred():
        config = _build(kind, value, path)
    check_config(config, path)
    return config


def _build(kind: Any, value: Any, path: str) -> Any:
    if typing.get_origin(kind) in UNIONS:
        return None if value is None else _build(optional(kind), value, path)
    kind = bare(kind)  # ranges are checked later, on the whole, where flags are known
    if typing.get_origin(kind) is tuple:
        check(isinstance(value, list), f"{flag(path)} must be a list, not {shown(value)}")
        pairs = enumerate(zip(elements(kind, value, path), value, strict=True))
        return tuple(_build(element, v, join(path, str(i))) for i, (element, v) in pairs)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        check_value(kind, value, path)  # before the conversion, which takes "1" and True as well
        return float(value) if kind is float else value
    name = flag(path) if path else "the config"
    check(isinstance(value, dict), f"{name} must be an object, not {shown(value)}")
    known = field_types(kind)
    unknown = sorted(join(path, key) for key in set(value) - set(known))
    check(not unknown, f"unknown field {', '.join(unknown)}")
    missing = sorted({*known} - {*value} - defaulted(kind))
    check(not missing, f"{', '.join(join(path, name) for name in missing)} is missing")
    return kind(**{k: _build(known[k], v, join(path, k)) for k, v in value.items()})


def defaulted(kind: type) -> set[str]:
    """Name the fields of a dataclass that have a default."""
    nothing = dataclasses.MISSING
    return {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is not nothing or field.default_factory is not nothing
    }
