"""Your own data: a builder that reads manifests, one file for each split.

A manifest is JSON lines, a JSON list, or a table with a header (CSV, TSV; also by semicolons or
bars). An entry names one clip or image and what is said about it:

    {"media": "clips/1.mp4", "captions": ["a dog runs"], "id": "1", "type": "video",
     "questions": [{"question": "what runs?", "answer": "a dog", "kind": "what"}],
     "labels": ["dog"]}
    {"media": "clips/2.mp4", "question": "what runs?", "options": ["a dog", "a cat"],
     "answer": "a dog"}

    media,caption,labels
    clips/1.mp4,"a dog runs, fast",dog|animal

`media` (absolute, or relative to the manifest) is required, and a caption, a question or a label.
Of `options` the answer is one, or its place from 0. Entries of equal `id` (by default: of equal
`media`) are correct matches for each other's captions. `type` is "video" or "image", by default
what the file ending says. Where entries have a `split`, those of another split are left out.

A cell of a table holds one text, or several between bars where the column is `captions`, `labels`
or `options`; columns may have other names that `COLUMNS` lists. Rows of a table, and entries of a
list, are joined to one clip where media and id are equal. JSON lines are not: they may be millions.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping

from data_pipelines.media.endings import type_of
from data_pipelines.schema.checks import MissingError, UserError, check, visible
from data_pipelines.schema.records import Question
from data_pipelines.storage.builders import base, entries, readers
from data_pipelines.storage.builders.forms import REFUSED, SPLIT_NAMES, form_of
from data_pipelines.storage.builders.media import file_size
from data_pipelines.storage.builders.named import check_names
from data_pipelines.storage.tasks import Skipped, Task, map_threads

_QUESTION = ("question", "answer", "kind", "options")
FIELDS = ("media", "caption", "captions", "id", "type", "split", "questions", "labels", *_QUESTION)
# Field -> names of its column in tables; the first one that a table has counts.
COLUMNS = {
    "media": (
        *("media", "video", "image", "path", "file", "filename", "file_name", "file_path"),
        *("filepath", "video_path", "image_path", "video_id", "clip"),
    ),
    "caption": ("caption", "text", "sentence", "description", "title"),
    "labels": ("labels", "label", "class", "category", "tags"),
    **{name: (name,) for name in ("captions", "id", "type", "split", *_QUESTION)},
}
_LISTS = ("captions", "labels", "options")  # whose cells hold several texts
_BETWEEN = "|"
EXPECTED = {
    "table": ("media,caption", 'clips/1.mp4,"a dog runs, fast"'),
    "json": (
        '{"media": "clips/1.mp4", "captions": ["a dog runs", "a dog"]}',
        '{"media": "clips/2.mp4", "question": "what runs?", "answer": "a dog"}',
    ),
}


class Manifest(base.VideoTextBuilder):
    """A data set from manifests; it is stored under the given name."""

    def __init__(
        self,
        *,
        name: str,
        splits: Mapping[str, str | pathlib.Path],
        manual_dir: str | pathlib.Path | None = None,
        fields: Mapping[str, str] | None = None,
        **kwargs,
    ):
        """Take the name of the data set and, by split, the manifests.

        Args:
          name: what to call the data set.
          splits: the manifest of each split.
          manual_dir: the folder from which paths of media count; None: that of the manifest.
          fields: field (of `FIELDS`) -> what the manifests call it.
          **kwargs: those of all builders.

        Raises:
          UserError: a name that cannot be a folder or a split, no split, or an unknown field.
          MissingError: a manifest does not exist.
        """
        check_names("manifest", name, splits)
        self.name, self.manual_dir, self.fields = name, manual_dir, dict(fields or {})
        self.manifests = {split: pathlib.Path(path).expanduser() for split, path in splits.items()}
        for field in self.fields:
            check(field in FIELDS, f"--field {field}: must be one of {', '.join(FIELDS)}")
        for split, path in self.manifests.items():
            if not path.is_file():
                raise MissingError(f"manifest of split {split!r}: {path}: no such file")
        super().__init__(**kwargs)

    def examples(self) -> dict[str, Iterable[Task | Skipped]]:
        """Yield one task for each clip, in the order of the entries."""
        return {
            split: read_manifest(path, split, self.manual_dir, self.fields)
            for split, path in self.manifests.items()
        }

    def inputs(self) -> tuple[pathlib.Path, ...]:
        """Return the manifests."""
        return tuple(self.manifests.values())


def read_manifest(
    path: pathlib.Path,
    split: str = "",
    folder: str | pathlib.Path | None = None,
    fields: Mapping[str, str] | None = None,
) -> Iterator[Task | Skipped]:
    """Yield the tasks of a manifest; one whose media file is missing becomes `Skipped`.

    Args:
      path: the manifest; its content says the form.
      split: entries of another split are left out; "" takes all.
      folder: of the media; None: the manifest's.
      fields: field -> what the manifest calls it.

    Raises:
      UserError: a malformed entry; the message names file, line and field, and shows two good ones.
    """
    form = _form(path)
    check(form not in REFUSED, f"{path}: {REFUSED.get(form, '').format(path)}")
    check(form != "sqlite", f"{path}: an SQLite file: vlmae prepare annotations reads it")
    root = os.path.expanduser(folder or path.parent)  # as text: a path each would take long
    tasks = _tasks(_entries(path, form, fields or {}), path, split, root)
    shown = _with_example(tasks, "table" if form == "table" else "json")
    return map_threads(_find, shown if form == "json_lines" else _joined(shown))


def is_manifest(path: pathlib.Path) -> bool:
    """Return True if a file reads as a manifest, and its first entry leads to a file."""
    form = _form(path)
    if form in REFUSED or form == "sqlite":
        return False
    try:
        place, entry = next(_entries(path, form, {}), ("", None))
        task = read_entry(entry, str(path.parent), place)
    except UserError:
        return False
    return isinstance(task, Task) and file_size(task.path) is not None


def _form(path: pathlib.Path) -> str:
    return "json_lines" if path.suffix == ".jsonl" else form_of(path)


def _entries(
    path: pathlib.Path, form: str, fields: Mapping[str, str]
) -> Iterator[tuple[str, object]]:
    """Yield (place, entry), its fields under the names of `FIELDS`."""
    if form == "table":
        yield from _table_entries(path, fields)
        return
    names = {own: field for field, own in fields.items()}
    read = readers.read_entries if form == "json_list" else readers.read_json_lines
    for place, entry in read(path):
        known = isinstance(entry, dict) and names
        yield place, {names.get(name, name): x for name, x in entry.items()} if known else entry


def _table_entries(path: pathlib.Path, fields: Mapping[str, str]) -> Iterator[tuple[str, dict]]:
    """Yield (place, entry) of the rows of a table; names columns that are not read on stderr."""
    columns: dict[str, str] = {}  # column -> field
    for place, row in readers.read_table(path):
        if not columns:
            columns = _columns(path, [*row], fields)
            if unread := [name for name in row if name not in columns]:
                note = f"{path}: columns that are not read: {', '.join(unread)}"
                print(visible(note), file=sys.stderr)
        cells = {columns[name]: text.strip() for name, text in row.items() if name in columns}
        filled = {field: text for field, text in cells.items() if text}
        lists = {name: _texts(filled[name]) for name in _LISTS if name in filled}
        # Without a text in any cell the clip is skipped and counted, not an error.
        none = {} if "caption" in filled else {"captions": []}
        known = {"labels": []} if "labels" in columns.values() else {}
        yield place, none | known | filled | lists


def _columns(path: pathlib.Path, header: list[str], fields: Mapping[str, str]) -> dict[str, str]:
    """Return the field of each column that is read.

    Raises:
      UserError: a column of `fields` is missing, or that of the media.
    """
    spelled = {name.strip().lower(): name for name in reversed(header)}
    found = {}
    for field, own in fields.items():
        check(own in header, f"{path}:1: column {own!r} is missing (--field {field}={own})")
        found[own] = field
    for field, names in COLUMNS.items():
        name = next((spelled[name] for name in names if name in spelled), None)
        if field not in fields and name is not None:
            found.setdefault(name, field)
    found |= {name: name for name in header if entries.OPTION_COLUMN.fullmatch(name)}
    said = ", ".join(header)
    check(
        "media" in found.values(),
        f"{path}:1: no column for the media ({', '.join(COLUMNS['media'])}) among {said}; the "
        "first line must name the columns (--field media=NAME: one of another name)",
    )
    check(
        bool({"caption", "captions", "labels", "question", "options"} & {*found.values()}),
        f"{path}:1: no column for captions, labels or questions ({', '.join(COLUMNS['caption'])}, "
        f"{', '.join(COLUMNS['labels'])}, question) among {said}; --field caption=NAME names one",
    )
    return found


def _texts(cell: str) -> list[str]:
    return [text.strip() for text in cell.split(_BETWEEN) if text.strip()]


def _tasks(
    found: Iterable[tuple[str, object]], path: pathlib.Path, split: str, root: str
) -> Iterator[Task | Skipped]:
    """Yield the tasks of the entries that belong to a split, before their files are looked for."""
    names, others, count = SPLIT_NAMES.get(split, (split,)), set(), 0
    for place, entry in found:
        own = entry.get("split", split) if isinstance(entry, dict) else split
        if split and own not in names:
            others.add(str(own))
            continue
        count += 1
        yield read_entry(entry, root, place)
    check(
        count > 0 or not others, f"{path}: no split {split!r}; it has {', '.join(sorted(others))}"
    )


def _with_example(tasks: Iterator[Task | Skipped], form: str) -> Iterator[Task | Skipped]:
    """Add to an error what was expected."""
    try:
        yield from tasks
    except UserError as error:
        good = "\n".join(f"  {line}" for line in EXPECTED[form])
        raise UserError(f"{error}\nexpected are lines such as:\n{good}") from error


def _joined(tasks: Iterator[Task | Skipped]) -> Iterator[Task | Skipped]:
    """Join the texts about one clip, in the order of their first appearance."""
    groups: dict[tuple[str, str], list[Task]] = {}
    for task in tasks:
        if isinstance(task, Skipped):
            yield task
        else:
            groups.setdefault((task.path, task.match_id), []).append(task)
    for group in groups.values():
        texts = {
            name: tuple(dict.fromkeys(text for x in group for text in getattr(x, name) or ()))
            for name in ("captions", "questions", "labels")
        }
        known = any(task.labels is not None for task in group)
        yield dataclasses.replace(group[0], **texts if known else texts | {"labels": None})


def _find(task: Task | Skipped) -> Task | Skipped:
    size = None if isinstance(task, Skipped) else file_size(task.path)
    if isinstance(task, Skipped) or size is not None:
        return dataclasses.replace(task, size=size) if size is not None else task
    return Skipped(task.source, "without a media file", task.path)


def read_entry(entry: object, folder: str, place: str) -> Task | Skipped:
    """Return the task of an entry, before its file is looked for; `folder` holds the media.

    Raises:
      UserError: names place and field.
    """
    fields = _check_fields(entry, place)
    captions, questions = tuple(fields["captions"]), tuple(fields["questions"])
    labels = fields.get("labels")
    if not (captions or questions or labels is not None):
        return Skipped(place, "without a text")
    # Joined as text: objects of pathlib would take most of the time for millions of lines.
    path = os.path.join(folder, fields["media"])
    return Task(
        path=path,
        size=0,
        media_type=fields.get("type", type_of(path)),
        captions=captions,
        match_id=fields.get("id", fields["media"]),
        source=place,
        questions=questions,
        labels=None if labels is None else tuple(labels),
    )


def _check_fields(entry: object, place: str) -> dict:
    """Return the entry with lists of captions, questions and labels.

    Raises:
      UserError: names the wrong field.
    """
    _require(isinstance(entry, dict), place, "must be one JSON object")
    # Refused, not ignored: a misspelled `captions` would leave clips without texts.
    unknown = [x for x in entry if x not in FIELDS and not entries.OPTION_COLUMN.fullmatch(x)]
    _require(not unknown, place, f"unknown field {unknown and unknown[0]!r}")
    _require("media" in entry, place, "field 'media' is missing")
    given = [name for name in ("caption", "captions") if name in entry]
    _require(len(given) < 2, place, "only one of the fields 'caption' and 'captions' may be given")
    _require(
        given or {"questions", "question", "labels", "options"} & entry.keys(),
        place,
        "a field 'caption', 'captions', 'question', 'questions' or 'labels' is required",
    )
    for name in ("media", "id", "caption"):
        text = isinstance(entry.get(name, ""), str)
        _require(text, place, f"field {name!r} must be text")
    for name in ("captions", "labels"):
        _require(_is_texts(entry.get(name, [])), place, f"field {name!r} must be a list of texts")
    _require(isinstance(entry.get("questions", []), list), place, "field 'questions' is no list")
    known = entry.get("type", "video") in ("video", "image")
    _require(known, place, "field 'type' must be 'video' or 'image'")
    captions = [entry["caption"]] if "caption" in entry else entry.get("captions", [])
    questions = [_question(item, place) for item in entry.get("questions", [])]
    more_captions, more_questions = _own_question(entry, place)
    return {
        **{"captions": [*captions, *more_captions], "questions": [*questions, *more_questions]},
        **{name: entry[name] for name in ("media", "id", "type", "labels") if name in entry},
    }


def _own_question(entry: Mapping, place: str) -> entries.Texts:
    """Return the question that an entry asks by its own fields, if it asks any."""
    said = {
        name: value
        for name, value in entry.items()
        if name in _QUESTION or entries.OPTION_COLUMN.fullmatch(name)
    }
    return entries.texts_of_entry(said, place) if said else ((), ())


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
