"""One entry of any annotation file, by a table of the names that its fields have in the wild."""

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.records import Question
from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.annotation import Annotation, paragraph

Fields = Mapping[str, tuple[str, ...]]

# Role -> names of the field; the first one that an entry has counts.
# Short names last: `id` and `name` are often something else, where a better one exists.
FIELDS: Fields = {
    "media": (
        *("video", "image", "clip_name", "video_id", "video_name", "gif_name", "image_id"),
        *("video_path", "image_path", "file_name", "vid", "id"),
    ),
    "caption": (
        *("caption", "captions", "sentence", "sentences", "text", "texts", "description"),
        *("label", "name"),
    ),
    "question": ("question",),
    "answer": ("answer", "answers"),
    "options": ("options", "candidates", "choices"),
    "kind": ("answer_type", "question_type", "type"),
}
OPTION_COLUMN = re.compile(r"(?:a|option_?)\d")  # of tables: a0 to a4, or a1 to a5

Texts = tuple[tuple[str, ...], tuple[Question, ...]]  # captions and questions


def fields_of(named: Mapping[str, str]) -> Fields:
    """Return the table with the names that the user gave for some roles.

    Raises:
      UserError: an unknown role.
    """
    for role in named:
        check(role in FIELDS, f"--field {role}: must be one of {', '.join(FIELDS)}")
    return {**FIELDS, **{role: (name,) for role, name in named.items()}}


def annotations_of(
    entry: Any,
    place: str,
    fields: Fields = FIELDS,
    *,
    paragraphs: bool = False,
    match_captions: bool = False,
) -> Iterator[Annotation]:
    """Yield what an entry says about each of its clips or images; mostly it has one.

    Args:
      entry: an object with the fields of `FIELDS`.
      place: the entry, for messages.
      fields: role -> names.
      paragraphs: several captions are the sentences of one (DiDeMo, ActivityNet).
      match_captions: clips of equal caption are right answers to each other's queries (SSv2).

    Raises:
      UserError: a field is missing or of another type; the message names place and field.
    """
    check(isinstance(entry, dict), f"{place}: must be an object")
    name = require(entry, "media", place, fields)
    captions, questions = texts_of_entry(entry, place, fields)
    if paragraphs and captions:
        captions = (paragraph(captions),)
    match_id = captions[0] if match_captions and captions else ""
    media_type = name if name in ("video", "image") else ""
    for media in _names(entry[name], name, place):
        yield Annotation(media, place, captions, questions, (), match_id, media_type)


def texts_of_entry(entry: Mapping[str, Any], place: str, fields: Fields = FIELDS) -> Texts:
    """Return the captions and questions of an entry.

    A question has an answer or, where several people gave one, the most frequent. A multiple choice
    has options, or several captions with an answer; its answer is the place of the right one (from
    0) or the right one itself.

    Raises:
      UserError: neither a caption nor a question, or a malformed one.
    """
    check(isinstance(entry, dict), f"{place}: must be an object")
    question, options = find(entry, "question", fields), _options(entry, place, fields)
    # Options decide: the same files name open questions and multiple choice alike.
    if question and not options:
        answer = _most_frequent(entry, place, fields)
        return (), (Question(_text(entry, question, place), answer, _kind(entry, fields)),)
    if question:
        right = _right(entry, options, place, fields)
        text = _text(entry, question, place)
        return (), (Question(text, right, _kind(entry, fields), options),)
    captions = options or _captions(entry, place, fields)
    if not find(entry, "answer", fields):
        return captions, ()
    right = _right(entry, captions, place, fields)
    return (right,), (Question("", right, "multiple choice", captions),)


def find(entry: Mapping[str, Any], role: str, fields: Fields = FIELDS) -> str | None:
    """Return the name of the field of a role, None if the entry has none."""
    return next((name for name in fields[role] if entry.get(name) is not None), None)


def require(entry: Mapping[str, Any], role: str, place: str, fields: Fields = FIELDS) -> str:
    """Return the name of the field of a role.

    Raises:
      UserError: the entry has none; names the fields that it has.
    """
    name = find(entry, role, fields)
    if name is None:
        raise UserError(
            f"{place}: no field for the {role} ({', '.join(fields[role])}) among its fields "
            f"{', '.join(map(str, entry))}; say which by --field {role}=NAME"
        )
    return name


def _names(value: Any, name: str, place: str) -> tuple[str, ...]:
    # Clips are numbered in some files; True is an int to Python.
    if isinstance(value, int) and not isinstance(value, bool):
        return (str(value),)
    return readers.texts_field({name: value}, name, place)


def _captions(entry: Mapping[str, Any], place: str, fields: Fields) -> tuple[str, ...]:
    """Return the captions; a list of lists holds the words of each, as CLIP4Clip keeps them."""
    name = require(entry, "caption", place, fields)
    value = entry[name]
    if isinstance(value, list) and value and all(isinstance(words, list) for words in value):
        value = [" ".join(readers.texts_field({name: words}, name, place)) for words in value]
    return readers.texts_field({name: value}, name, place)


def _options(entry: Mapping[str, Any], place: str, fields: Fields) -> tuple[str, ...]:
    name = find(entry, "options", fields)
    if name:
        return readers.texts_field(entry, name, place)
    # Sorted by name, since a table may hold its columns in any order.
    columns = sorted(filter(OPTION_COLUMN.fullmatch, entry))
    return tuple(_text(entry, column, place) for column in columns)


def _right(entry: Mapping[str, Any], options: tuple[str, ...], place: str, fields: Fields) -> str:
    """Return the right option; a number, also as text, is its place."""
    name = require(entry, "answer", place, fields)
    answer = entry[name]
    by_place = options[int(answer)] if str(answer) in map(str, range(len(options))) else None
    by_text = answer if answer in options else None
    if any(map(OPTION_COLUMN.fullmatch, entry)):  # a table: all is text there, places too
        by_text = None if by_place is not None else by_text
    check(
        by_place is None or by_text is None or by_place == by_text,
        f"{place}: field {name!r} is {answer!r}, an option and the place of another; write the "
        "place as a number, without quotation marks",
    )
    right = by_text if by_place is None else by_place
    check(
        right is not None,
        f"{place}: field {name!r} must be one of 0 to {len(options) - 1} or of the options, not "
        f"{answer!r}",
    )
    return right


def _most_frequent(entry: Mapping[str, Any], place: str, fields: Fields) -> str:
    name = require(entry, "answer", place, fields)
    if isinstance(entry[name], (int, float)):
        return str(entry[name])
    answers = readers.texts_field(entry, name, place)
    check(bool(answers), f"{place}: field {name!r} is empty")
    [(answer, _)] = collections.Counter(answers).most_common(1)
    return answer


def _text(entry: Mapping[str, Any], name: str, place: str) -> str:
    return readers.field(entry, name, str, place)


def _kind(entry: Mapping[str, Any], fields: Fields) -> str:
    return str(entry.get(find(entry, "kind", fields), ""))
