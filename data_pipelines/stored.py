"""Prepared data sets on disk: their folders, records and vocabularies."""

import os
import pathlib
from collections.abc import Sequence

import tensorflow_datasets as tfds

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.tokenize import Tokenizer, load_tokenizer


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


def tokenizer_for(config: DataConfig) -> Tokenizer:
    """`config.tokenizer`, or the vocabulary prepared with the first training source."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    return load_tokenizer(dataset_folder(config.train[0].name, config.data_dir))
