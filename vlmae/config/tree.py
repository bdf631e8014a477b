"""Trees of config dataclasses as plain data: flattened, compared, changed by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipelines.schema.checks import check
from data_pipelines.schema.json_files import from_dict


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a config to dotted names and plain values: {"model.video.mask.ratio": 0.65, ...}."""
    if dataclasses.is_dataclass(config):
        items = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    elif isinstance(config, tuple):
        items = [(str(i), value) for i, value in enumerate(config)]
    else:
        return {prefix.rstrip("."): config}
    return {k: v for name, value in items for k, v in flatten(value, f"{prefix}{name}.").items()}


def differing(one: Any, other: Any) -> list[str]:
    """Name the fields in which two configs differ, sorted; a field of only one counts too."""
    # Flat names, so that a tuple that grew shows its new elements and not only that it differs.
    left, right = flatten(one), flatten(other)
    names = sorted(left.keys() | right.keys())
    return [name for name in names if left.get(name) != right.get(name)]


def override(config: Any, changes: Mapping[str, Any]) -> Any:
    """Change fields by dotted names; the checks run once, on the result.

    A value may be a config of its own, or a tuple of them.

    >>> override(config, {"model.video.mask.ratio": 0.75, "data.train.0.num_frames": 8})

    Raises:
      UserError: there is no such field, or the result is refused; names it.
    """
    tree = _jsonable(config)  # plain data that can be changed, which frozen dataclasses cannot
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
    # Through JSON's form, so that overrides, sweeps and saved files are read by the same code.
    return from_dict(type(config), tree)


def _jsonable(value: Any) -> Any:
    """Turn tuples into lists and dataclasses into dicts, as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, list | tuple) else value
