"""Types of config fields with their ranges, and the base class that checks them.

A range is part of the annotation (`ratio: Annotated[float, Ge(0), Lt(1)]`), so one function checks
every field of every config, and messages name the command line's flag.
"""

import collections.abc
import contextlib
import contextvars
import dataclasses
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf

from data_pipelines.schema.checks import UserError, check

Size = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Ratio = Annotated[float, Ge(0), Lt(1)]  # a fraction removed: something is always left
Rate = Annotated[float, Gt(0), Le(1)]  # a fraction kept
Share = Annotated[float, Ge(0), Le(1)]

BOUNDS = {  # annotation -> the name of its limit, the check, the words for it
    Ge: ("ge", operator.ge, "at least {}"),
    Gt: ("gt", operator.gt, "greater than {}"),
    Le: ("le", operator.le, "at most {}"),
    Lt: ("lt", operator.lt, "less than {}"),
    MultipleOf: ("multiple_of", lambda value, factor: value % factor == 0, "a multiple of {}"),
    MinLen: ("min_length", lambda value, least: len(value) >= least, "of length {} or more"),
}
UNIONS = (Union, types.UnionType)  # of an annotated type, of a plain one
INT_LIMIT = 2**63  # NumPy holds no larger integer
# A context variable and no global, so that other threads keep checking their configs.
_deferred = contextvars.ContextVar("deferred", default=False)


class Checked:
    """Base of config dataclasses: a value out of its range raises when the config is made."""

    def __post_init__(self) -> None:
        """Check all fields, unless `checks_deferred` leaves that to the whole config."""
        if not _deferred.get():
            try:
                check_config(self)
            except UserError as error:
                raise UserError(f"{type(self).__name__}: {error}") from None

    def check_together(self) -> None:
        """Raise UserError for fields that do not fit each other; name them as `--field`."""


@contextlib.contextmanager
def checks_deferred() -> Iterator[None]:
    """Leave configs unchecked while they are made part by part.

    A part does not know where it stands in the whole. `check_config` on the whole does, and names
    the flag as it is typed: `--model.video.mask.ratio`, not `--ratio`.
    """
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def check_config(config: Any, path: str = "") -> None:
    """Check each field, nested configs included, and then the fields against each other.

    Args:
      config: a dataclass, made by any means.
      path: of the config inside the whole, "model.video"; messages begin flags with it.

    Raises:
      UserError: names the flag, the range and the value.
    """
    # Fields first: `check_together` computes with them and would fail on a bad one in its own way.
    kinds = field_types(type(config))  # type: ignore[arg-type]  # classes can be hashed
    for name, kind in kinds.items():
        check_value(kind, getattr(config, name), join(path, name))
    if not isinstance(config, Checked):  # a record of a run, see `json_files.to_record`
        return
    try:
        config.check_together()
    except UserError as error:
        prefix = f"{flag(path)}." if path else "--"
        raise UserError(re.sub(r"--(?=[a-z])", prefix, str(error))) from None


def check_value(kind: Any, value: Any, path: str) -> None:
    """Check one value against a field's annotation: its type, choices and range.

    An int may stand for a float, but not a bool for an int; NaN and infinity are refused.

    Raises:
      UserError: names the flag.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        check_value(parts[0], value, path)
        _check_range(parts[1:], value, path)
    elif origin in UNIONS:
        if value is not None:
            check_value(optional(kind), value, path)
    elif origin is Literal:
        choices = ", ".join(map(str, parts))
        check(value in parts, f"{flag(path)} must be one of {choices}, not {shown(value)}")
    elif origin is collections.abc.Mapping:
        check(isinstance(value, dict), f"{flag(path)} must be an object, not {shown(value)}")
        for name, v in value.items():
            check_value(parts[1], v, join(path, name))
    elif origin is tuple:
        check(isinstance(value, tuple), f"{flag(path)} must be a tuple, not {shown(value)}")
        for i, (element, v) in enumerate(zip(elements(kind, value, path), value, strict=True)):
            check_value(element, v, join(path, str(i)))
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        good = isinstance(value, kind)
        check(good, f"{flag(path)} must be of type {kind.__name__}, not {shown(value)}")
        check_config(value, path)
    elif kind is not Any:
        _check_scalar(kind, value, path)


def elements(kind: Any, values: typing.Sized, path: str) -> tuple[Any, ...]:
    """Return the type of each element of a tuple field.

    Raises:
      UserError: a tuple of fixed length has another one; names the flag.
    """
    parts = typing.get_args(kind)
    if parts[-1] is Ellipsis:
        return (parts[0],) * len(values)
    good = len(values) == len(parts)
    check(good, f"{flag(path)} must have {len(parts)} values, not {shown(values)}")
    return parts


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass, with its range."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def optional(kind: Any) -> Any:
    """Return the type of a field that may be None: `Ratio` of `Ratio | None`."""
    (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return kind


def bare(kind: Any) -> Any:
    """Return a type without its range."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def join(path: str, name: str) -> str:
    """Join a path and a field: ("model.video", "depth") -> "model.video.depth"."""
    return f"{path}.{name}" if path else name


def flag(path: str) -> str:
    """Spell the path of a field as its flag.

    >>> flag("model.video.mlp_dim")
    '--model.video.mlp-dim'
    """
    return "--" + path.replace("_", "-")


def shown(value: Any) -> str:
    """Show a value that is refused, in a line of at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_scalar(kind: type, value: Any, path: str) -> None:
    good = type(value) is kind or (kind is float and type(value) is int)
    check(good, f"{flag(path)} must be of type {kind.__name__}, not {shown(value)}")
    if type(value) is int:
        check(abs(value) < INT_LIMIT, f"{flag(path)} must be below 2^63, not {shown(value)}")
    if type(value) is float:
        check(math.isfinite(value), f"{flag(path)} must be finite, not {value}")


def _check_range(bounds: tuple[Any, ...], value: Any, path: str) -> None:
    wanted, good = [], True
    for bound in bounds:
        attribute, holds, words = BOUNDS[type(bound)]
        limit = getattr(bound, attribute)
        wanted.append(words.format(limit))
        good = good and holds(value, limit)
    check(good, f"{flag(path)} must be {' and '.join(wanted)}, not {shown(value)}")
