"""The classes of a task, counted in the training sources."""

import pathlib
from collections.abc import Iterable

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.classes import Classes, count_classes, load_classes
from data_pipelines.schema.config import DataConfig
from data_pipelines.storage.records import RecordTexts
from data_pipelines.storage.stored import read_texts


def classes_for(config: DataConfig) -> Classes | None:
    """Return the classes of the config's task: `config.classes`, or those of the training sources.

    None for captions and for options, which are no classes. Equal counts are ordered by name. A
    published list of names keeps its order, and is counted in the training sources.

    Raises:
      UserError: the training sources have no answer or label.
      MissingError: a data set or the file is missing.
    """
    if config.task in ("captions", "options"):
        return None
    if not config.classes:
        return _count(config, config.max_classes)
    # A published list fixes the numbers, so that checkpoints of others' answer heads fit.
    listed = load_classes(pathlib.Path(config.classes).expanduser())
    if any(listed.counts.values()):
        return listed
    # Counted here all the same: the blind guess of each kind of question is the baseline of its
    # table.
    counts = _count(config).counts
    return Classes({name: counts.get(name, {}) for name in listed.names})


def _count(config: DataConfig, limit: int = 0) -> Classes:
    texts = (text for source in config.train for text in read_texts(source, config.data_dir))
    classes = count_classes(_named(texts, config.task), limit)
    if not classes.counts:
        sources = ", ".join(f"{source.name}/{source.split}" for source in config.train)
        raise UserError(f"data.task={config.task}, but {sources} has none")
    return classes


def _named(texts: Iterable[RecordTexts], task: str) -> Iterable[tuple[str, str]]:
    if task == "labels":
        return ((label, "") for text in texts for label in text.labels)
    return ((item.answer, item.kind) for text in texts for item in text.questions)
