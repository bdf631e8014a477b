"""Forms of annotation files in the wild, each read as (place, entry) for all its entries.

| form | written by |
|---|---|
| JSON list of entries | Singularity, VindLU, official SSv2 labels |
| JSON lines | ClipBERT, ALPRO, CLIP-ViP, All-in-one, EMCL, HBI |
| JSON object {split: [entry]} | VIOLET |
| JSON object {clip: captions} or {clip: entry} | X-Pool, ActivityNet Captions |
| JSON object of `videos` and `sentences` | official MSR-VTT (`*_videodatainfo.json`), CLIP4Clip |
| JSON object of `images` and `annotations` | Frozen's MSR_VTT.json, official COCO |
| table with a header, by commas, tabs, semicolons or bars | HQGA, NExT-QA, T-MASS |
| SQLite, table `annos` | VindLU, UMT |
"""

import contextlib
import itertools
import pathlib
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.schema.checks import UserError, check
from data_pipelines.storage.builders import readers
from data_pipelines.storage.builders.entries import FIELDS, require

Rows = Iterator[tuple[str, Any]]  # place and entry
SPLIT_NAMES = {"val": ("val", "validate", "validation", "dev"), "train": ("train", "training")}
REFUSED = {  # form -> why, and what to do
    "pickle": (
        "a pickle can run any code when it is opened, so it is not read. If you trust its author, "
        'convert it: python -c "import json, pickle; '
        "json.dump(pickle.load(open('{0.name}', 'rb')), open('{0.stem}.json', 'w'))\""
    ),
    "parquet": "a Parquet file: vlmae prepare parquet reads it, media included",
    "packed": "a packed file; unpack it first (gunzip, unzip)",
}


def read_rows(path: pathlib.Path, split: str | None = None) -> Rows:
    """Yield (place, entry) of an annotation file in any form.

    Args:
      path: the file; its content says the form, its ending does not.
      split: the part of a file with several splits; None: all of it, in its order.

    Raises:
      UserError: a form that is not read, with what to do; or a file without that split.
    """
    form = form_of(path)
    if form in REFUSED:
        raise UserError(f"{path}: {REFUSED[form].format(path)}")
    return _object(path, split) if form == "json_object" else READERS[form](path)


def form_of(path: pathlib.Path) -> str:
    """Return a key of `READERS` or `REFUSED`, or "json_object", by the first bytes of a file."""
    with path.open("rb") as file:
        # By content: published files end in .json or .csv whatever they hold.
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"SQLite format 3\0"):
        return "sqlite"
    if start.startswith(b"\x80") or path.suffix in (".pkl", ".pickle"):
        return "pickle"
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        return "packed"
    if start.startswith(b"{"):
        return "json_lines" if _has_lines(path) else "json_object"
    return "json_list" if start.startswith(b"[") else "table"


def _has_lines(path: pathlib.Path) -> bool:
    """Return True if the first line is JSON by itself and another one follows."""
    lines = list(itertools.islice(readers.read_lines(path), 2))
    try:
        readers.parse_json(lines[0][1], path)
    except UserError:
        return False
    return len(lines) == 2 or path.suffix == ".jsonl"


def read_ids(path: pathlib.Path) -> list[str]:
    """Return the clips that a list names: a line each, or the clips of a table or JSON file."""
    lines = [line for _, line in readers.read_lines(path)]
    check(bool(lines), f"{path}: names no clip")
    if form_of(path) == "table" and readers.find_separator(lines[0]) not in lines[0]:
        return [line for line in lines if line not in FIELDS["media"]]  # without a header
    ids = []
    for place, entry in read_rows(path):
        ids.append(entry if isinstance(entry, str) else str(entry[require(entry, "media", place)]))
    return ids


def _object(path: pathlib.Path, split: str | None) -> Rows:
    content = readers.read_json(path, dict)
    # From the most particular form to the least: {clip: captions} would take all the others.
    if isinstance(content.get("sentences"), list) and isinstance(content.get("videos"), list):
        return _sentences(content, path, split)
    parts = content.values()
    if isinstance(content.get("annotations"), list):
        return _captioned_images(content, path)
    if all(isinstance(part, list) and part and all(map(_is_object, part)) for part in parts):
        return _splits(content, path, split)
    if content and all(isinstance(value, int) for value in parts):
        raise UserError(f"{path}: a list of answers, not annotations: --data.classes takes it")
    return _clips(content, path)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _splits(content: Mapping[str, list], path: pathlib.Path, split: str | None) -> Rows:
    for name in content if split is None else [_own_name(split, content, path)]:
        for index, entry in enumerate(content[name]):
            yield f"{path}: {name}[{index}]", entry


def _sentences(content: Mapping[str, list], path: pathlib.Path, split: str | None) -> Rows:
    """Yield sentences; `videos` says which clip is of which split."""
    clips = filter(_is_object, content["videos"])
    splits = {clip.get("video_id"): clip.get("split") for clip in clips}
    known = set(filter(None, splits.values()))
    wanted = _own_name(split, known, path) if split is not None and known else None
    for index, entry in enumerate(content["sentences"]):
        clip = entry.get("video_id") if _is_object(entry) else None
        if wanted is None or splits.get(clip) == wanted:
            yield f"{path}: sentences[{index}]", entry


def _captioned_images(content: Mapping[str, list], path: pathlib.Path) -> Rows:
    """Yield annotations, with the file names of `images` where these have them."""
    images = filter(_is_object, content.get("images", ()))
    files = {image.get("id"): image.get("file_name") for image in images}
    for index, entry in enumerate(content["annotations"]):
        name = files.get(entry.get("image_id")) if _is_object(entry) else None
        yield f"{path}: annotations[{index}]", entry | {"image": name} if name else entry


def _clips(content: Mapping[str, Any], path: pathlib.Path) -> Rows:
    """Yield an entry for each clip of an object {clip: captions} or {clip: entry}."""
    for clip, value in content.items():
        entry = value if isinstance(value, dict) else {"caption": value}
        yield f"{path}[{clip!r}]", entry | {"video_id": clip}


def _own_name(split: str, known, path: pathlib.Path) -> str:
    """Return what the file calls a split."""
    names = [name for name in SPLIT_NAMES.get(split, (split,)) if name in known]
    check(bool(names), f"{path}: no split {split!r}; it has {', '.join(sorted(known))}")
    return names[0]


@contextlib.contextmanager
def _damage_named(path: pathlib.Path) -> Iterator[None]:
    """Raise UserError, naming the file, for what SQLite raises in the block."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not an SQLite file that can be read ({error})") from error


def _sqlite(path: pathlib.Path) -> Rows:
    """Yield the rows of the only table, or of `annos`."""
    # Read-only, or SQLite would make a missing file, and a journal beside one.
    with (
        _damage_named(path),
        contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db,
    ):
        tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        known = [name for (name,) in tables if name == "annos" or len(tables) == 1]
        check(bool(known), f"{path}: the SQLite file has no table 'annos'")
        [table] = known
        # SQLite promises no order without one, and shards are cut by it.
        rows = db.execute(f'SELECT * FROM "{table}" ORDER BY rowid')
        names = [column for column, *_ in rows.description]
        for number, row in enumerate(rows):
            yield f"{path}: {table}[{number}]", dict(zip(names, row, strict=True))


READERS = {
    "json_list": readers.read_entries,
    "json_lines": readers.read_json_lines,
    "table": readers.read_table,
    "sqlite": _sqlite,
}
