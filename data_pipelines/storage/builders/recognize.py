"""Says what lies in a folder, and by which commands it is prepared."""

import collections
import itertools
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.media.endings import is_media
from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.classes import load_classes
from data_pipelines.storage.builders.entries import annotations_of
from data_pipelines.storage.builders.folder import Found, class_of, find_media
from data_pipelines.storage.builders.forms import form_of, read_rows
from data_pipelines.storage.builders.manifest import is_manifest
from data_pipelines.storage.builders.registry import PUBLISHED, builder_class

_ANNOTATION_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".db", ".sqlite", ".pkl", ".pickle")
_SPLIT = re.compile(r"(?<![a-z])(train|val|test)(?:ing|id|idation|idate)?(?![a-z])")


def describe_folder(folder: Path) -> str:
    """Return a line for each thing that can be prepared from a folder and its subfolders."""
    known, used = _published(folder)
    media = list(find_media(folder))
    used |= {Path(found.texts) for found in media if found.texts}
    files = [path for path in _files(folder) if path not in used]
    lines = [*known, *_tars(folder, files), *_parquet(folder, files), *_others(folder, files)]
    if any(found.texts for found in media) or not lines:
        lines += _own_folder(folder, media)
    if lines:
        return "\n".join(lines)
    if media:
        return (
            f"{folder}: media without texts; write a table with a line for each clip, or a file of "
            "text beside each:\n  media,caption\n  clips/1.mp4,a dog runs\n"
            "vlmae prepare manifest --name NAME --split train=FILE"
        )
    return f"{folder}: nothing that is known"


def _own_folder(folder: Path, media: list[Found]) -> Iterator[str]:
    """Yield a line for a folder of media with texts beside them, or of folders of classes."""
    parts = {class_of(folder, found.path) for found in media}
    splits = {split: folder / part for part in parts if (split := _split_of(Path(part)))}
    # Each part a split, or else the whole folder one.
    chosen = splits if len(splits) == len(parts) > 0 else {"train": folder}
    classes = {class_of(_root_of(chosen, found), found.path) for found in media} - {""}
    # One folder is no choice between classes.
    if any(found.texts for found in media) or len(classes) > 1:
        yield _command("folder", folder, chosen)


def _root_of(splits: dict[str, Path], found: Found) -> Path:
    return next(root for root in splits.values() if Path(found.path).is_relative_to(root))


def _published(folder: Path) -> tuple[list[str], set[Path]]:
    """Return a line for each published data set whose files are there, and these files."""
    lines, used = [], set()
    for name in PUBLISHED:
        builder = builder_class(name)(data_dir=folder, manual_dir=folder)
        try:
            for split in builder.published:
                # One entry tells what the files are; counting would read gigabytes.
                for annotation in itertools.islice(builder.annotations(split), 1):
                    builder.media_names(annotation)
        except MissingError:
            continue
        except UserError as error:
            lines.append(f"{name}, but: {error}")
        else:
            lines.append(f"{name}: vlmae prepare {name} --manual-dir {shlex.quote(str(folder))}")
        used |= set(builder.inputs())
    return lines, used


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of its subfolders, none of them media, in order."""
    for where, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(where, name) for name in sorted(names) if not is_media(name))


def _tars(folder: Path, files: list[Path]) -> Iterator[str]:
    groups = collections.defaultdict(list)
    for path in files:
        if path.suffix == ".tar":
            groups[path.parent].append(path.stem)
    for parent, stems in groups.items():
        pattern = "{" + f"{stems[0]}..{stems[-1]}" + "}"
        numbered = all(stem.isdecimal() and len(stem) == len(stems[0]) for stem in stems)
        # A range only if none is missing: preparing it would stop at the first gap.
        whole = numbered and int(stems[-1]) - int(stems[0]) + 1 == len(stems)
        split = _split_of(parent.relative_to(folder)) or "train"
        files_of = parent / f"{pattern if whole and len(stems) > 1 else '*'}.tar"
        yield _command("webdataset", parent, {split: files_of})


def _parquet(folder: Path, files: list[Path]) -> Iterator[str]:
    tables = [p for p in files if p.suffix == ".parquet" and not p.with_suffix(".tar").is_file()]
    groups = collections.defaultdict(dict)
    for path in tables:
        split = _split_of(Path(path.name)) or _split_of(path.relative_to(folder)) or "train"
        pattern = re.sub(r"\d{2,}", "*", path.name)
        groups[path.parent].setdefault(split, path.with_name(pattern))
    for parent, splits in groups.items():
        yield _command("parquet", parent, splits)


def _others(folder: Path, files: list[Path]) -> Iterator[str]:
    """Yield lines for annotation files; those that differ in the split only make one data set."""
    groups = collections.defaultdict(dict)
    for path in files:
        if not path.name.lower().endswith(_ANNOTATION_ENDINGS):
            continue
        try:
            builder = _reader_of(path)
        except UserError as error:
            yield f"{path}: not read: {str(error).removeprefix(f'{path}: ')}"
            continue
        if builder == "classes":
            yield f"{path}: a list of answers: --data.classes {shlex.quote(str(path))}"
            continue
        split = _split_of(Path(path.name)) or "train"
        rest = _SPLIT.sub("", path.stem.lower())
        groups[builder, path.parent, rest, path.suffix].setdefault(split, path)
    media = _media_folder(folder, default=folder)
    for (builder, parent, *_), splits in groups.items():
        extra = f" --media {shlex.quote(str(media))}" if builder == "annotations" else ""
        yield _command(builder, parent, splits) + extra


def _reader_of(path: Path) -> str:
    """Return the builder that reads a file, or "classes" for a list of answers.

    Raises:
      UserError: none does; says why.
    """
    if form_of(path) == "json_object":
        try:
            load_classes(path)
        except UserError:
            pass
        else:
            return "classes"
    if is_manifest(path):
        return "manifest"
    first = next(iter(read_rows(path)), None)
    if first is None:
        raise UserError(f"{path}: has no entry")
    place, entry = first
    next(annotations_of(entry, place), None)
    return "annotations"


def _split_of(path: Path) -> str | None:
    found = _SPLIT.findall(str(path).lower())
    return found[-1] if found else None


def _command(builder: str, parent: Path, splits: dict[str, Path]) -> str:
    name = re.sub("[^a-z0-9]+", "_", parent.resolve().name.lower()).strip("_0123456789") or "mine"
    words = " ".join(f"--split {shlex.quote(f'{s}={path}')}" for s, path in sorted(splits.items()))
    return f"{builder}: vlmae prepare {builder} --name {name} {words}"


def _media_folder(folder: Path, default: Path | None) -> Path | None:
    """Return the first folder, from the top, that holds a media file."""
    for where, folders, names in os.walk(folder):
        folders.sort()
        if any(map(is_media, names)):
            return Path(where)
    return default
