"""Clips and rows of the sources of a config: what an epoch is."""

import functools
import pathlib
from typing import NamedTuple

from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.storage.records import RecordTexts
from data_pipelines.storage.stored import dataset_folder, read_texts


class Rows(NamedTuple):
    """Size of a source."""

    clips: int
    texts: int
    """Rows of an epoch: captions, questions, or clips with a label, whatever the task reads."""


def count_rows(source: SourceConfig, config: DataConfig) -> Rows:
    """Count the clips of a source, and what the task reads of them.

    Raises: as `open_source`.
    """
    folder = dataset_folder(source.name, config.data_dir)
    return _count(folder, source, config.data_dir, config.task)


# Read once: ten million texts take a minute or two. Another version has another folder.
@functools.lru_cache(maxsize=64)
def _count(folder: pathlib.Path, source: SourceConfig, data_dir: str, task: str) -> Rows:
    del folder
    stored = read_texts(source, data_dir)
    if task == "labels":  # no text is read: a clip without labels is one that has none of them
        return Rows(len(stored), len(stored))
    return Rows(len(stored), sum(_rows_of(item, task) for item in stored))


def _rows_of(item: RecordTexts, task: str) -> int:
    return len(item.captions if task == "captions" else item.questions)
