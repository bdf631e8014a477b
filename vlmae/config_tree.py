"""Trees of dataclasses as plain data: checked, read from JSON, flattened, changed by name."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from data_pipelines.config import check


def check_values(config: Any, prefix: str = "") -> None:
    """Checks every value of a config against its annotation, as `check_value` does.

    The command line does this by itself; configs from Python code come this way.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(kind):
            check_values(value, f"{prefix}{name}.")
        elif isinstance(kind, types.GenericAlias):
            element = typing.get_args(kind)[0]
            for i, v in enumerate(value):
                check_value(element, v, f"{prefix}{name}.{i}")
        else:
            check_value(kind, value, f"{prefix}{name}")


def check_value(kind: Any, value: Any, name: str) -> None:
    """Raises ValueError, naming the field, for a plain value of another type or none of a Literal.

    An int will do for a float; a bool is no int.
    """
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        check(value in choices, f"{name}={value!r} is none of {', '.join(choices)}")
    elif kind in (bool, int, float, str):
        good = type(value) is kind or (kind is float and type(value) is int)
        check(good, f"{name} must be of type {kind.__name__}, not {value!r}")


def from_dict(kind: Any, value: Any, name: str = "") -> Any:
    """Builds a value of type `kind` (a config, a tuple of values or a plain type) from JSON.

    Raises:
      ValueError: a field is unknown or its value is out of range; names it.
    """
    if isinstance(kind, types.GenericAlias):  # tuple[SourceConfig, ...]
        check(isinstance(value, list), f"{name} must be a list, not {value!r}")
        element = typing.get_args(kind)[0]
        return tuple(from_dict(element, v, f"{name}.{i}") for i, v in enumerate(value))
    if not dataclasses.is_dataclass(kind):
        check_value(kind, value, name)
        return float(value) if kind is float else value
    check(isinstance(value, dict), f"{name or 'the config'} must be an object, not {value!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    check(not unknown, f"unknown field {', '.join(f'{name}.{key}'.strip('.') for key in unknown)}")
    fields = {k: from_dict(hints[k], v, f"{name}.{k}".strip(".")) for k, v in value.items()}
    return kind(**fields)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field names and their plain values: {"model.video.mask.ratio": 0.65, ...}."""
    if dataclasses.is_dataclass(config):
        items = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    elif isinstance(config, tuple):
        items = [(str(i), value) for i, value in enumerate(config)]
    else:
        return {prefix.rstrip("."): config}
    return {k: v for name, value in items for k, v in flatten(value, f"{prefix}{name}.").items()}


def override(config: Any, changes: Mapping[str, Any]) -> Any:
    """The config with the fields of these dotted names changed; all checks run once, at the end.

    A value may be a config of its own, or a tuple of them.

    >>> override(config, {"model.video.mask.ratio": 0.75, "data.train.0.num_frames": 8})

    Raises:
      ValueError: there is no such field, or the result is refused; names it.
    """
    tree = _jsonable(config)
    for name, value in changes.items():
        *parents, last = name.split(".")
        node = tree
        for key in (*parents, last):
            child = int(key) if isinstance(node, list) and key.isdigit() else key
            known = isinstance(node, dict) and child in node
            known |= isinstance(node, list) and isinstance(child, int) and child < len(node)
            check(known, f"unknown field {name}")
            parent, node = node, node[child]
        parent[child] = _jsonable(value)
    return from_dict(type(config), tree)


def _jsonable(value: Any) -> Any:
    """The same with lists for tuples and dicts for dataclasses, as if it came from JSON."""
    if dataclasses.is_dataclass(value):
        return _jsonable(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, list | tuple) else value
