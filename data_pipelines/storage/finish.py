"""The last step of a preparation: from finished shards to a folder that counts as prepared."""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds

from data_pipelines.schema.checks import visible
from data_pipelines.storage import plan as planning
from data_pipelines.storage.builders.base import VideoTextBuilder
from data_pipelines.storage.pictures import pictures_path
from data_pipelines.storage.records import features
from data_pipelines.storage.shards import Shard, Workspace
from data_pipelines.storage.shared_media import write_shared
from data_pipelines.storage.stored import REENCODE_KEY, SHARDS_FILE, read_digests, read_info
from data_pipelines.storage.tasks import Skipped, Tally
from data_pipelines.storage.texts import all_texts, join_texts, parse_line, texts_path
from data_pipelines.text import tokenize

VOCABULARY_SIZE = 8192
# Records lie in random order, or in that of web shards, so the first ones of a split are a fair
# sample of it.
VOCABULARY_TEXTS = 1 << 18


class Piece(NamedTuple):
    """The records of one shard file, on their way into the prepared folder."""

    path: pathlib.Path
    num_records: int
    num_bytes: int
    digest: str  # empty: not known
    texts: pathlib.Path | None  # None: part of the texts of the data set before


def finish(
    builder: VideoTextBuilder, space: Workspace, plan: planning.Plan, before: pathlib.Path | None
) -> dict[str, int]:
    """Write everything that stands beside the records; return their number by split.

    Can be called again after an interruption: shards are linked, not moved.

    Args:
      builder: the data set.
      space: the workspace, with every shard finished.
      plan: the shards.
      before: the prepared folder to which they are added, if there is one.

    Raises:
      UserError: more examples were skipped than `max_bad_ratio` allows, or a whole split was.
    """
    # Digests and sizes are in the marks: nothing of the media is read again.
    pieces = _new_pieces(space, plan)
    counts = {split: sum(p.num_records for p in group) for split, group in pieces.items()}
    report_skipped(builder, space, plan, counts)
    old = _old_pieces(before) if before else {}
    if before:
        _append_file(space.folder / planning.SKIPPED_FILE, before / planning.SKIPPED_FILE)
        # Old shards first: the records of a split keep their numbers, so slices of it stay what
        # they were.
        pieces = {s: old.get(s, []) + pieces.get(s, []) for s in {**old, **pieces}}
    digests, splits = {}, []
    for split, group in pieces.items():
        texts = [texts_path(before, split)] if split in old else []
        join_texts(space.folder, split, texts + [p.texts for p in group if p.texts])
        for index, piece in enumerate(group):
            name = Shard(split, index, len(group)).file_name(builder.name)
            _link(piece.path, space.folder / name)
            if pictures_path(piece.path).is_file():  # of clips that are stored as frames
                _link(pictures_path(piece.path), pictures_path(space.folder / name))
            digests[name] = piece.digest
        splits.append(_split_info(builder.name, space.folder, split, group))
    # By content, so that a run can tell whether its data changed, wherever they lie now.
    (space.folder / SHARDS_FILE).write_text(json.dumps(digests, indent=1), "utf-8")
    for sentence in write_shared(space.folder, pieces):
        print(f"{builder.name}: {sentence}", file=sys.stderr)
    _write_vocabulary(builder, space.folder, before, pieces)
    _write_info(builder, space, splits)
    planning.note_part(space, plan, before)
    return {split: sum(p.num_records for p in group) for split, group in pieces.items()}


def report_skipped(
    builder: VideoTextBuilder, space: Workspace, plan: planning.Plan, counts: dict[str, int]
) -> None:
    """List the skipped examples of the finished shards, and say on stderr how many there are.

    Args:
      builder: the data set.
      space: where some shards are finished.
      plan: the shards.
      counts: of each split, its usable examples as far as is known.

    Raises:
      UserError: too many are skipped, or a split has no usable example.
    """
    # Of finished shards only: it also runs when a preparation is stopped halfway.
    marks = [space.read_mark(shard) for shard in plan.shards() if space.mark(shard).is_file()]
    found = itertools.chain.from_iterable(mark.skipped for mark in marks)
    tally = _list_skipped(space, found)
    planning.check_not_empty(builder, counts, tally)
    message = planning.check_bad_ratio(builder, tally, plan.num_examples, space)
    listed = space.folder.with_name(space.version) / planning.SKIPPED_FILE
    for reason, count in tally.parts.most_common():
        text = f"{builder.name}: left out {count} {reason}, see {listed}"
        print(visible(text), file=sys.stderr)
    if message:
        print(visible(f"{message}; skipped, see {listed}"), file=sys.stderr)


def _list_skipped(space: Workspace, found: Iterable[Skipped]) -> Tally:
    """Write `skipped.jsonl`: those of the plan, then those of the shards."""
    tally = Tally()
    planned = planning.read_skipped(space.work / planning.SKIPPED_FILE)
    with (space.folder / planning.SKIPPED_FILE).open("w", encoding="utf-8") as file:
        for item in itertools.chain(planned, found):
            tally.add(item)
            file.write(json.dumps(dataclasses.asdict(item)) + "\n")
    return tally


def _new_pieces(space: Workspace, plan: planning.Plan) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = {split: [] for split in plan.num_shards}
    for shard in plan.shards():
        mark = space.read_mark(shard)
        if mark.num_records:  # nothing of an empty one is kept
            path = space.records(shard)
            fields = (mark.num_records, mark.num_bytes, mark.digest)
            pieces[shard.split].append(Piece(path, *fields, space.texts(shard)))
    return pieces


def _old_pieces(folder: pathlib.Path) -> dict[str, list[Piece]]:
    digests, pieces = read_digests(folder), {}
    for split, info in read_info(folder).splits.items():
        sizes = [info.num_bytes] + [0] * (len(info.shard_lengths) - 1)  # known as a sum only
        pieces[split] = [
            Piece(folder / path.name, count, size, digests.get(path.name, ""), None)
            for path, count, size in zip(info.filepaths, info.shard_lengths, sizes, strict=True)
        ]
    return pieces


def _split_info(
    dataset: str, folder: pathlib.Path, split: str, pieces: Sequence[Piece]
) -> tfds.core.SplitInfo:
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=dataset, split=split, filetype_suffix="array_record"
    )
    lengths = [piece.num_records for piece in pieces]
    num_bytes = sum(piece.num_bytes for piece in pieces)
    return tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
    )


def _write_info(
    builder: VideoTextBuilder, space: Workspace, splits: Sequence[tfds.core.SplitInfo]
) -> None:
    """Write the metadata of TFDS, with the form of the media under `reencode`."""
    form = {REENCODE_KEY: dataclasses.asdict(builder.reencode)} if builder.reencode else {}
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=builder.name,
        version=tfds.core.Version(space.version),
        data_dir=str(space.folder),
        module_name="",
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=features(), metadata=tfds.core.MetadataDict(form)
    )
    # Random access without TensorFlow; TFDS's default format needs it.
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(space.folder)


def _write_vocabulary(
    builder: VideoTextBuilder,
    folder: pathlib.Path,
    before: pathlib.Path | None,
    splits: Iterable[str],
) -> None:
    """Trains the WordPiece vocabulary; an added part keeps the one that models were trained by."""
    path = folder / tokenize.VOCABULARY_FILE
    if before:
        shutil.copyfile(before / tokenize.VOCABULARY_FILE, path)
        return
    # Training texts alone, where the split is known: test words must not shape the vocabulary.
    chosen = [split for split in splits if split in builder.vocabulary_splits] or list(splits)
    # Each text once, in the order of the records: the vocabulary depends on nothing else.
    texts: dict[str, None] = {}  # an ordered set
    for split in chosen:
        with texts_path(folder, split).open("rb") as lines:
            parsed = (parse_line(line, lines.name) for line in lines)
            said = itertools.chain.from_iterable(map(all_texts, parsed))
            texts.update(dict.fromkeys(itertools.islice(said, VOCABULARY_TEXTS // len(chosen))))
    vocabulary = tokenize.train_vocabulary(list(texts), VOCABULARY_SIZE)
    path.write_text("\n".join(vocabulary) + "\n", "utf-8")


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    """Give a file a second name, or copies it where the file system knows no links."""
    target.unlink(missing_ok=True)
    try:
        # A link costs no space, and an interrupted step can be repeated.
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _append_file(path: pathlib.Path, more: pathlib.Path) -> None:
    with path.open("ab") as file, more.open("rb") as lines:
        shutil.copyfileobj(lines, file)
