"""Media that two splits of a data set share: counted when it is prepared, said when it is used."""

import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

from data_pipelines.schema.checks import check
from data_pipelines.schema.config import DataConfig
from data_pipelines.schema.json_files import read_json
from data_pipelines.storage.stored import dataset_folder
from data_pipelines.storage.texts import texts_path

# A list of [split, other split, number of the split's media that the other has too].
SHARED_FILE = "shared_media.json"
_MATCH_ID = re.compile(rb'"match_id": ("(?:[^"\\]|\\.)*")')


def write_shared(folder: pathlib.Path, splits: Iterable[str]) -> list[str]:
    """Count the media of each split that another one has too; write `SHARED_FILE`.

    Media are compared by what says which captions match them: by default their path.

    Returns:
      Sentences that name splits and counts.
    """
    ids = {split: _match_ids(folder, split) for split in splits}
    found = []
    for pair in itertools.combinations(ids, 2):
        fewer, more = sorted(pair, key=lambda split: len(ids[split]))
        if count := len(ids[fewer] & ids[more]):
            found.append([fewer, more, count])
    (folder / SHARED_FILE).write_text(json.dumps(found), "utf-8")
    return [
        f"{count} of the {len(ids[fewer])} media of {fewer} are in {more} too"
        for fewer, more, count in found
    ]


def _match_ids(folder: pathlib.Path, split: str) -> set[int]:
    """Return hashes of the ids of a split's media; a search that parses no line."""
    with texts_path(folder, split).open("rb") as lines:
        # Hashes, not ids: a set of ten million stays below a gigabyte.
        return {hash(match[1]) for line in lines if (match := _MATCH_ID.search(line))}


def describe_shared(data: DataConfig) -> list[str]:
    """Say which media the evaluation shares with training sources of the same data set."""
    name = data.eval_source.name
    trained = [source.split for source in data.train if source.name == name]
    path = dataset_folder(name, data.data_dir) / SHARED_FILE
    if not trained or not path.is_file():  # folders of older versions lack it
        return []
    shared = read_json(path, list)
    good = all(isinstance(x, list) and [*map(type, x)] == [str, str, int] for x in shared)
    check(good, f"{path}: must hold lists of two splits and a number")
    evaluated, seen = _splits_in([data.eval.split]), _splits_in(trained)
    return [
        f"{name}: {count} media of {fewer} are in {more} too; one is trained on, the "
        "other evaluated"
        for fewer, more, count in shared
        if (fewer in evaluated and more in seen) or (more in evaluated and fewer in seen)
    ]


def _splits_in(expressions: Sequence[str]) -> set[str]:
    """Return the names of splits in expressions of TFDS: "train[:90%]+val"."""
    parts = "+".join(expressions).split("+")
    return {part.partition("[")[0].strip() for part in parts}
