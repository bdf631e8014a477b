"""Config fields that published weights need: `vlmae weights FOLDER_OR_HUB_NAME`."""

import dataclasses
from typing import Any

from vlmae.config.model import TextEncoderConfig, VideoEncoderConfig, VitLayout
from vlmae.weights.huggingface import Published, open_published


def as_python(published: Published) -> str:
    """Format the fields as a line of an experiment file, without those at their defaults."""
    part = published.family.part
    kind = {"text": TextEncoderConfig, "video": VideoEncoderConfig}[part]
    return f"{part}={_call(kind, published.fields)}"


def _call(kind: type, values: dict[str, Any]) -> str:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given = {name: value for name, value in values.items() if value != defaults[name]}
    shown = {
        name: _call(VitLayout, vars(value)) if isinstance(value, VitLayout) else repr(value)
        for name, value in given.items()
    }
    return f"{kind.__name__}({', '.join(f'{name}={text}' for name, text in shown.items())})"


def describe(source: str) -> None:
    """Print the family of published weights, and the fields of a config that fits them.

    Args:
      source: a folder, or the name of a model on the hub.

    Raises:
      UserError: no such folder or model, or one of an unknown family.
    """
    published = open_published(source)
    print(f"{published.model_type} in {published.folder}")
    print(as_python(published))
