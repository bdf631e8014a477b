"""Prepared data sets on disk: their folders, records, texts and vocabularies."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.records import Question
from data_pipelines.reencode import Reencode
from data_pipelines.tokenize import Tokenizer, load_tokenizer

REENCODE_KEY = "reencode"  # in the metadata of TFDS


@dataclasses.dataclass(frozen=True)
class RecordTexts:
    """A stored record without its media."""

    match_id: str
    source: str  # where it comes from
    captions: Sequence[str]
    questions: Sequence[Question]
    labels: Sequence[str]


def dataset_folder(name: str, data_dir: str | os.PathLike) -> pathlib.Path:
    """The folder of the newest prepared version of a data set.

    Raises:
      FileNotFoundError: it is not prepared; the message holds the command that does it.
    """
    root = pathlib.Path(data_dir).expanduser() / name
    found = [file.parent for file in root.glob("*/dataset_info.json") if _version(file.parent)]
    if not found:
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {data_dir}; run: "
            f"python -m data_pipelines.prepare {name} --data-dir {data_dir}"
        )
    return max(found, key=_version)


def read_form(folder: pathlib.Path) -> Reencode | None:
    """How the media of a prepared folder were encoded again; None: they are as they were."""
    metadata = tfds.builder_from_directory(folder).info.metadata or {}
    return Reencode(**metadata[REENCODE_KEY]) if REENCODE_KEY in metadata else None


def _version(folder: pathlib.Path) -> tuple[int, ...]:
    """(1, 0, 0) for a folder named 1.0.0, empty for any other (say, an unfinished one)."""
    parts = folder.name.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def open_source(source: SourceConfig, data_dir: str | os.PathLike) -> Sequence[dict]:
    """The records of one split: random access, each a dict of bytes, lists and dicts.

    Raises:
      FileNotFoundError: the data set is not prepared.
      ValueError: it has no such split, or the split is empty.
    """
    builder = tfds.builder_from_directory(dataset_folder(source.name, data_dir))
    try:
        return builder.as_data_source(source.split)  # raises for an empty part of a split, too
    except (KeyError, ValueError) as error:
        splits = ", ".join(
            f"{name} ({info.num_examples})" for name, info in builder.info.splits.items()
        )
        raise ValueError(
            f"data set {source.name!r}: split {source.split!r} is unknown or empty; known: {splits}"
        ) from error


def read_texts(source: SourceConfig, data_dir: str | os.PathLike) -> list[RecordTexts]:
    """The texts of every record of a split, in the order of the records.

    Reading them past the media takes as long as reading the media, so the first call keeps them
    in a file beside the records.

    Raises: as `open_source`.
    """
    cache = dataset_folder(source.name, data_dir) / f"texts_{_file_name(source.split)}.jsonl"
    if cache.is_file():
        return [_from_line(line) for line in cache.read_text("utf-8").splitlines()]
    texts = list(_scan(open_source(source, data_dir)))
    lines = [json.dumps(dataclasses.asdict(text)) + "\n" for text in texts]
    unfinished = cache.with_suffix(f".{os.getpid()}")
    try:
        unfinished.write_text("".join(lines), "utf-8")
        unfinished.replace(cache)
    except PermissionError:  # somebody else's folder: scanned anew each time
        pass
    return texts


def _scan(records: Sequence[dict]) -> Iterator[RecordTexts]:
    for record in (records[i] for i in range(len(records))):  # media are not kept
        yield RecordTexts(
            record["match_id"].decode(),
            record["source"].decode(),
            [text.decode() for text in record["captions"]],
            questions_of(record),
            [text.decode() for text in record["labels"]],
        )


def _from_line(line: str) -> RecordTexts:
    fields = json.loads(line)
    questions = [
        Question(**question | {"options": tuple(question.get("options", ()))})
        for question in fields.pop("questions")
    ]
    return RecordTexts(questions=questions, **fields)


def _file_name(split: str) -> str:
    """A split in TFDS notation as part of a file name: no two splits share one.

    >>> _file_name("train[:90%]")
    'train_5b_3a90_25_5d'
    """
    return re.sub(r"[^a-zA-Z0-9]", lambda found: f"_{ord(found[0]):x}", split)


def questions_of(record: dict) -> list[Question]:
    """The questions of a stored record (ours).

    Data sets prepared before questions had options are read as well: theirs have none.
    """
    stored = record["questions"]
    options = stored.get("options", [b"[]"] * len(stored["question"]))
    rows = zip(stored["question"], stored["answer"], stored["kind"], options, strict=True)
    return [
        Question(question.decode(), answer.decode(), kind.decode(), tuple(json.loads(choices)))
        for question, answer, kind, choices in rows
    ]


def tokenizer_for(config: DataConfig) -> Tokenizer:
    """`config.tokenizer`, or the vocabulary prepared with the first training source."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    return load_tokenizer(dataset_folder(config.train[0].name, config.data_dir))
