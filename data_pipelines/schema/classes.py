"""The answers or labels that a classifier tells apart."""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.json_files import parse_json, read_text

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

    def digest(self) -> str:
        """Hash the names in their order."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()[:32]

    def most_frequent(self, kind: str) -> str:
        """Return the most frequent answer to questions of a kind: the best blind guess."""
        return max(self.counts, key=lambda name: self.counts[name].get(kind, 0))

    def save(self, folder: pathlib.Path) -> None:
        """Write `classes.json` into a folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.counts, indent=1, ensure_ascii=False) + "\n"
        (folder / CLASSES_FILE).write_text(text, "utf-8")


def load_classes(path: pathlib.Path) -> Classes:
    """Read classes from a file in one of four forms.

    These are what `save` wrote, a JSON object {name: counts by kind}; the answer lists of ClipBERT
    and ALPRO (`train_ans2label.json`), a JSON object {name: number}; a JSON list of names; and a
    text file with a name in each line. All but the first say nothing about counts.

    Raises:
      UserError: the file holds something else; names it.
      MissingError: there is no such file.
    """
    text = read_text(path)
    if text.lstrip()[:1] not in ("{", "["):
        return _uncounted([line.strip() for line in text.splitlines() if line.strip()], path)
    content = parse_json(text, path)
    if isinstance(content, list):
        return _uncounted(content, path)
    if content and all(type(number) is int for number in content.values()):
        names = sorted(content, key=content.get)
        numbered = [content[name] for name in names] == list(range(len(names)))
        check(numbered, f"{path}: the numbers of its {len(names)} names are not 0, 1, 2, ...")
        return _uncounted(names, path)
    check(bool(content), f"{path}: names no class")
    for name, kinds in content.items():
        if not isinstance(kinds, dict) or not all(isinstance(n, int) for n in kinds.values()):
            raise UserError(
                f"{path}: class {name!r} must have a number, or an object of counts by kind"
            )
    return Classes(content)


def _uncounted(names: Sequence[str], path: pathlib.Path) -> Classes:
    good = names and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    check(bool(good), f"{path}: must hold names, each once")
    return Classes({name: {} for name in names})


def count_classes(named: Iterable[tuple[str, str]], limit: int = 0) -> Classes:
    """Count (name, kind) pairs as classes; `limit` keeps the most frequent, 0 all.

    >>> count_classes([("a", "x"), ("b", "x"), ("b", "y")]).counts
    {'b': {'x': 1, 'y': 1}, 'a': {'x': 1}}
    """
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for name, kind in named:
        counts[name][kind] += 1
    order = sorted(counts, key=lambda name: (-counts[name].total(), name))
    return Classes({name: dict(counts[name]) for name in order[: limit or None]})
