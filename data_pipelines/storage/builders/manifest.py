"""Your own data: a builder that reads JSON-lines manifests, one file for each split.

A line names one clip or image and what is said about it:

    {"media": "clips/1.mp4", "captions": ["a dog runs"], "id": "1", "type": "video",
     "questions": [{"question": "what runs?", "answer": "a dog", "kind": "what"}],
     "labels": ["dog"]}

`media` (absolute, or relative to the manifest) and `captions` or `caption` are required. Lines of
equal `id` (by default: of equal `media`) are correct matches for each other's captions. `type` is
"video" or "image", by default what the file ending says. A multiple-choice question has "options",
a list of texts with the answer among them.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from data_pipelines.media.endings import type_of
from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.records import Question
from data_pipelines.storage.builders import base, readers
from data_pipelines.storage.builders.media import file_size
from data_pipelines.storage.builders.named import check_names
from data_pipelines.storage.tasks import Skipped, Task, map_threads

FIELDS = ("media", "caption", "captions", "id", "type", "questions", "labels")


class Manifest(base.VideoTextBuilder):
    """A data set from manifests; it is stored under the given name."""

    def __init__(self, *, name: str, splits: Mapping[str, str | pathlib.Path], **kwargs):
        """Take the name of the data set and, by split, the manifests.

        Raises:
          UserError: a name that cannot be a folder or a split, or no split.
          MissingError: a manifest does not exist.
        """
        check_names("manifest", name, splits)
        self.name = name
        self.manifests = {split: pathlib.Path(path) for split, path in splits.items()}
        for split, path in self.manifests.items():
            if not path.is_file():
                raise MissingError(f"manifest of split {split!r}: {path}: no such file")
        super().__init__(**kwargs)

    def examples(self) -> dict[str, Iterable[Task | Skipped]]:
        """Yield one task a line, in the order of the lines."""
        return {split: read_manifest(path) for split, path in self.manifests.items()}

    def inputs(self) -> tuple[pathlib.Path, ...]:
        """Return the manifests."""
        return tuple(self.manifests.values())


def read_manifest(path: pathlib.Path) -> Iterator[Task | Skipped]:
    """Yield the tasks of a manifest; a line whose media file is missing becomes `Skipped`.

    Raises:
      UserError: a malformed line; the message names file, line and field.
    """
    return map_threads(_find, _read_lines(path))


def _read_lines(path: pathlib.Path) -> Iterator[Task]:
    folder = str(path.parent)  # once, not for each of millions
    for place, entry in readers.read_json_lines(path):
        yield _read_line(entry, folder, place)


def _find(task: Task) -> Task | Skipped:
    size = file_size(task.path)
    if size is None:
        return Skipped(task.source, "without a media file", task.path)
    return dataclasses.replace(task, size=size)


def _read_line(entry: object, folder: str, place: str) -> Task:
    """Return the task of a line, before its file is looked for."""
    fields = _check_fields(entry, place)
    # Joined as text: objects of pathlib would take most of the time for millions of lines.
    path = os.path.join(folder, fields["media"])
    return Task(
        path=path,
        size=0,
        media_type=fields.get("type", type_of(path)),
        captions=tuple(fields["captions"]),
        match_id=fields.get("id", fields["media"]),
        source=place,
        questions=tuple(_question(item, place) for item in fields.get("questions", [])),
        labels=tuple(fields.get("labels", [])),
    )


def _check_fields(entry: object, place: str) -> dict:
    """Return the entry with `captions` always a list; raises UserError naming the wrong field."""
    _require(isinstance(entry, dict), place, "must be one JSON object")
    fields = dict(entry)
    # Refused, not ignored: a misspelled `captions` would leave clips without texts.
    unknown = [name for name in fields if name not in FIELDS]
    _require(not unknown, place, f"unknown field {unknown and unknown[0]!r}")
    _require("media" in fields, place, "field 'media' is missing")
    _require(
        ("caption" in fields) != ("captions" in fields),
        place,
        "one of the fields 'caption' and 'captions' is required",
    )
    if "caption" in fields:
        _require(isinstance(fields["caption"], str), place, "field 'caption' must be text")
        fields["captions"] = [fields.pop("caption")]
    for name in ("media", "id"):
        text = isinstance(fields.get(name, ""), str)
        _require(text, place, f"field {name!r} must be text")
    for name in ("captions", "labels"):
        _require(_is_texts(fields.get(name, [])), place, f"field {name!r} must be a list of texts")
    _require(isinstance(fields.get("questions", []), list), place, "field 'questions' is no list")
    known = fields.get("type", "video") in ("video", "image")
    _require(known, place, "field 'type' must be 'video' or 'image'")
    return fields


def _question(item: object, place: str) -> Question:
    _require(isinstance(item, dict), place, "field 'questions' must hold objects")
    for name in ("question", "answer"):
        good = isinstance(item.get(name), str) and item[name].strip()
        _require(good, place, f"field 'questions': {name!r} must be text")
    unknown = sorted(set(item) - {"question", "answer", "kind", "options"})
    _require(not unknown, place, f"field 'questions': unknown field {unknown and unknown[0]!r}")
    options = item.get("options", [])
    _require(_is_texts(options), place, "field 'questions': 'options' must be a list of texts")
    among = not options or item["answer"] in options
    _require(among, place, "field 'questions': 'answer' is not one of the 'options'")
    return Question(item["question"], item["answer"], str(item.get("kind", "")), tuple(options))


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _require(condition: object, place: str, message: str) -> None:
    if not condition:
        raise UserError(f"{place}: {message}")
