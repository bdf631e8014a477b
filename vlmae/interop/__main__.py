"""What a config needs for published weights: `python -m vlmae.interop FOLDER_OR_HUB_NAME`."""

import dataclasses
import sys
from typing import Any

from vlmae.interop.published import Published, open_published
from vlmae.model_config import TextEncoderConfig, VideoEncoderConfig, VitLayout


def as_python(published: Published) -> str:
    """The fields as a line of an experiment file; those at their defaults are left out."""
    part = published.family.part
    kind = {"text": TextEncoderConfig, "video": VideoEncoderConfig}[part]
    return f"{part}={_call(kind, published.fields)}"


def _call(kind: type, values: dict[str, Any]) -> str:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given = {name: value for name, value in values.items() if value != defaults[name]}
    shown = ", ".join(f"{name}={_value(value)}" for name, value in given.items())
    return f"{kind.__name__}({shown})"


def _value(value: Any) -> str:
    return _call(VitLayout, vars(value)) if isinstance(value, VitLayout) else repr(value)


def main(arguments: list[str]) -> None:
    """Prints the family and the fields."""
    if len(arguments) != 1:
        sys.exit("usage: python -m vlmae.interop FOLDER_OR_HUB_NAME")
    try:
        published = open_published(arguments[0])
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{published.model_type} in {published.folder}")
    print(as_python(published))


if __name__ == "__main__":
    main(sys.argv[1:])
