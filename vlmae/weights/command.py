"""Config fields that published weights need: `vlmae weights FOLDER_OR_HUB_NAME`."""

import dataclasses
from typing import Any

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.json_files import read_json
from vlmae.config.model import TextEncoderConfig, TextLayout, VideoEncoderConfig, VitLayout
from vlmae.weights.huggingface import TOWERS, Published, find, open_published

LAYOUTS = (TextLayout, VitLayout)


def as_python(published: Published) -> str:
    """Format the fields as a line of an experiment file, without those at their defaults."""
    part = published.family.part
    kind = {"text": TextEncoderConfig, "video": VideoEncoderConfig}[part]
    return f"{part}={_call(kind, published.fields)}"


def _call(kind: type, values: dict[str, Any]) -> str:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given = {name: value for name, value in values.items() if value != defaults[name]}
    shown = {
        name: _call(type(value), vars(value)) if isinstance(value, LAYOUTS) else repr(value)
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
    folder = find(source)
    whole = read_json(folder / "config.json")
    # Both encoders of a whole CLIP; anything else is one.
    parts = [part for part, (tower, _) in TOWERS.items() if tower in whole] or ["video"]
    problems = []
    for part in parts:
        try:
            published = open_published(str(folder), part)
        except UserError as error:
            problems.append(error)
            continue
        print(f"{published.model_type} in {published.folder}")
        print(as_python(published))
        if published.embed_dim:
            print(f"embed_dim={published.embed_dim}  # to take over its projection")
    if len(problems) == len(parts):
        raise problems[0]
    print(*problems, sep="\n", end="\n" if problems else "")
