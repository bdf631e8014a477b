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

import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

from data_pipelines.builders import base
from data_pipelines.records import Example, Question

FIELDS = ("media", "caption", "captions", "id", "type", "questions", "labels")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Manifest(base.VideoTextBuilder):
    """A data set from manifests; it is stored under the given name."""

    def __init__(self, *, name: str, splits: Mapping[str, str | pathlib.Path], **kwargs):
        """Args: `splits` maps the name of a split to its manifest.

        Raises:
          ValueError: a name that cannot be a folder or a split, or no split.
          FileNotFoundError: a manifest does not exist.
        """
        if not splits:
            raise ValueError(f"manifest {name!r}: name at least one split (--split train=PATH)")
        for word in (name, *splits):
            if not re.fullmatch("[a-z][a-z0-9_]*", word):
                raise ValueError(f"manifest: {word!r} must be letters a-z, digits and _")
        self.name = name
        self.manifests = {split: pathlib.Path(path) for split, path in splits.items()}
        for split, path in self.manifests.items():
            if not path.is_file():
                raise FileNotFoundError(f"manifest of split {split!r}: {path}: no such file")
        super().__init__(**kwargs)

    def examples(self) -> dict[str, Iterable[Example | base.Skipped]]:
        """One example a line, in the order of the lines."""
        return {split: read_manifest(path) for split, path in self.manifests.items()}


def read_manifest(path: pathlib.Path) -> Iterator[Example | base.Skipped]:
    """The examples of a manifest; a line whose media file cannot be read becomes `Skipped`.

    Raises:
      ValueError: a malformed line; the message names file, line and field.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _read_line(line, path, f"{path}:{number}")


def _read_line(line: str, path: pathlib.Path, place: str) -> Example | base.Skipped:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    fields = _check_fields(entry, place)
    file = path.parent / fields["media"]
    try:
        media = file.read_bytes()
    except OSError as error:
        return base.Skipped(place, "without a readable media file", f"{file}: {error.strerror}")
    return Example(
        media=media,
        media_type=fields.get("type", _type_of(file)),
        captions=fields["captions"],
        match_id=fields.get("id", fields["media"]),
        source=place,
        questions=[_question(item, place) for item in fields.get("questions", [])],
        labels=fields.get("labels", []),
    )


def _type_of(file: pathlib.Path) -> str:
    return "image" if file.suffix.lower() in IMAGE_SUFFIXES else "video"


def _check_fields(entry: object, place: str) -> dict:
    """The entry with `captions` always a list; raises ValueError naming the wrong field."""
    _require(isinstance(entry, dict), place, "must be one JSON object")
    fields = dict(entry)
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
        raise ValueError(f"{place}: {message}")
