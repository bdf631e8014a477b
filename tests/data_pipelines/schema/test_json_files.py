"""The one reader of JSON: names file, place and field; checks types as a config does."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.json_files import parse_json, read_json, read_record


@dataclasses.dataclass(frozen=True)
class Part:
    number: int


@dataclasses.dataclass(frozen=True)
class Record:
    name: str
    secs: float
    kind: Literal["a", "b"]
    parts: tuple[Part, ...]
    counts: Mapping[str, int]
    any_size: int | None = None
    more: Any = None


GOOD = {"name": "x", "secs": 1, "kind": "a", "parts": [{"number": 2}], "counts": {"y": 3}}
BAD_TEXTS = {
    "nothing": (b"", "not JSON: Expecting value: line 1"),
    "half": (b'{"name": ', "not JSON"),
    "nested": (b"[" * 100_000, "not JSON: nested too deeply"),
    "nested objects": (b'{"a":' * 100_000, "not JSON: nested too deeply"),
    "digits": (b"9" * 5000, "not JSON: Exceeds the limit"),
    "bytes": (b'{"name": "\xff"}', "not UTF-8"),
    "a list": (b"[]", "must hold an object"),
}
BAD_FIELDS = {
    "missing": ({"secs": ...}, "secs is missing"),
    "unknown": ({"seconds": 1}, "unknown field seconds"),
    "text": ({"secs": "1"}, "secs must be of type float, not '1'"),
    "bool": ({"secs": True}, "secs must be of type float, not True"),
    "infinite": ({"secs": float("inf")}, "secs must be finite"),
    "huge": ({"secs": 2**70}, "secs must be below 2^63"),
    "choice": ({"kind": ["a"]}, "kind must be one of a, b"),
    "tuple": ({"parts": {}}, "parts must be a list"),
    "element": ({"parts": [{"number": 2}, {"number": 2.5}]}, "parts.1.number must be of type int"),
    "mapping": ({"counts": {"y": None}}, "counts.y must be of type int"),
    "optional": ({"any_size": 1.5}, "any_size must be of type int"),
    "long": ({"name": [0] * 1000}, "name must be of type str"),
}


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "file.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_bad_field_is_named(tmp_path, changes, message):
    path = tmp_path / "file.json"
    fields = {name: value for name, value in (GOOD | changes).items() if value is not ...}
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError) as error:
        read_record(Record, path)
    assert str(error.value).startswith(f"{path}: {message}") and len(str(error.value)) < 400


def test_a_record_comes_back(tmp_path):
    path = tmp_path / "file.json"
    record = Record("x", 1.0, "a", (Part(2),), {"y": 3}, 4, more=[None, {"z": 1}])
    path.write_text(json.dumps(dataclasses.asdict(record)))
    assert read_record(Record, path) == record
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())  # as some editors save it
    assert read_record(Record, path) == Record("x", 1.0, "a", (Part(2),), {"y": 3})


def test_half_a_pair_becomes_a_question_mark():
    assert parse_json(r'{"a": "cut \ud83d", "b": "\ud83d\udc36"}', "x") == {"a": "cut ?", "b": "🐶"}


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(MissingError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
