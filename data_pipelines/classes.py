"""The answers or labels that a classifier tells apart."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from data_pipelines.config import DataConfig
from data_pipelines.stored import RecordTexts, read_texts

CLASSES_FILE = "classes.json"


@dataclasses.dataclass(frozen=True)
class Classes:
    """Answers or labels, the most frequent first; the place of a name is its number.

    `counts` says how often training has each, by kind of question ("" for labels).
    """

    counts: Mapping[str, Mapping[str, int]]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in their order."""
        return tuple(self.counts)

    @property
    def numbers(self) -> dict[bytes, int]:
        """The number of every class, by its name as it stands in records."""
        return {name.encode(): i for i, name in enumerate(self.counts)}

    def most_frequent(self, kind: str) -> str:
        """The most frequent answer to questions of a kind: what a blind guess would say."""
        return max(self.counts, key=lambda name: self.counts[name].get(kind, 0))

    def save(self, folder: pathlib.Path) -> None:
        """Writes `classes.json` into a folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.counts, indent=1, ensure_ascii=False) + "\n"
        (folder / CLASSES_FILE).write_text(text, "utf-8")


def load_classes(path: pathlib.Path) -> Classes:
    """Reads what `save` wrote: a JSON object of names, each with its counts by kind.

    Raises:
      ValueError: the file holds something else; names it.
    """
    try:
        counts = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not counts or not isinstance(counts, dict):
        raise ValueError(f"{path}: must be a JSON object with a name for each class")
    for name, kinds in counts.items():
        if not isinstance(kinds, dict) or not all(isinstance(n, int) for n in kinds.values()):
            raise ValueError(f"{path}: class {name!r} must have an object of counts by kind")
    return Classes(counts)


def classes_for(config: DataConfig) -> Classes | None:
    """The classes of the config's task: `config.classes`, or those of the training sources.

    None for captions and for options, which are no classes. Equal counts are ordered by name.

    Raises:
      ValueError: the training sources have no answer or label.
      FileNotFoundError: a data set or the file is missing.
    """
    if config.task in ("captions", "options"):
        return None
    if config.classes:
        return load_classes(pathlib.Path(config.classes).expanduser())
    texts = [text for source in config.train for text in read_texts(source, config.data_dir)]
    classes = count_classes(_named(texts, config.task), config.max_classes)
    if not classes.counts:
        sources = ", ".join(f"{source.name}/{source.split}" for source in config.train)
        raise ValueError(f"data.task={config.task}, but {sources} has none")
    return classes


def count_classes(named: Iterable[tuple[str, str]], limit: int = 0) -> Classes:
    """Classes from (name, kind) pairs; `limit` keeps the most frequent, 0 all.

    >>> count_classes([("a", "x"), ("b", "x"), ("b", "y")]).counts
    {'b': {'x': 1, 'y': 1}, 'a': {'x': 1}}
    """
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for name, kind in named:
        counts[name][kind] += 1
    order = sorted(counts, key=lambda name: (-counts[name].total(), name))
    return Classes({name: dict(counts[name]) for name in order[: limit or None]})


def _named(texts: Sequence[RecordTexts], task: str) -> Iterable[tuple[str, str]]:
    if task == "labels":
        return ((label, "") for text in texts for label in text.labels)
    return ((item.answer, item.kind) for text in texts for item in text.questions)
