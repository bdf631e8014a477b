"""Build the prepared folder of a data set, from any builder.

    DATA_DIR/NAME/1.0.0/                   the prepared folder
        NAME-train.array_record-00000-of-00004   records, see `records`
        (the same).pictures                      clips stored as frames, see `pictures`
        texts_train.jsonl, texts_train.npy       what is said about each, see `texts`
        vocab.txt                                WordPiece vocabulary of the training texts
        skipped.jsonl                            a line for each example or text left out
        shards.json                              a digest of the records of each shard
        dataset_info.json, features.json         metadata of TFDS, which reads the records, too
    DATA_DIR/NAME/incomplete.1.0.0/        the same until it is finished, with a folder `work`

A part that is added later makes a version 1.0.1 with links to the shards of 1.0.0, so that both can
be read and no clip is stored twice.
"""

import contextlib
import fcntl
import itertools
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import IO

from data_pipelines.schema.checks import UserError, check
from data_pipelines.storage import plan as planning
from data_pipelines.storage.builders.base import VideoTextBuilder
from data_pipelines.storage.finish import finish, report_skipped
from data_pipelines.storage.shards import Workspace, write_shards
from data_pipelines.storage.stored import (
    has_all_texts,
    newest_version,
    parse_version,
    read_form,
    write_missing_texts,
)
from data_pipelines.storage.tasks import Tally
from data_pipelines.storage.waiting import waiting


def build(
    builder: VideoTextBuilder,
    *,
    workers: int = 1,
    num_shards: int | None = None,
    part: tuple[int, int] | None = None,
    add: bool = False,
    overwrite: bool = False,
) -> pathlib.Path:
    """Prepare a data set unless it is there already, and return its folder.

    Several processes may call it at once: one builds, the others wait. What an interrupted one has
    finished is kept: the same call goes on.

    Args:
      builder: what to prepare.
      workers: processes that read and check media; the stored bytes do not depend on it.
      num_shards: of each split; None: by size.
      part: (i, n) writes only every n-th shard, from the i-th on, and finishes nothing: for n
        machines that share a file system. Afterwards a call without it finishes.
      add: adds the clips to the data set that is there, as a new version.
      overwrite: prepares it anew, as a new version; the old one stays for runs that read it.

    Returns:
      The prepared folder; the unfinished one if only a part was asked for.

    Raises:
      UserError: too many unusable examples, or what was begun was another preparation.
    """
    # The version is part of the path, so a running training keeps the files that it has open.
    root, builder.workers = builder.data_dir / builder.name, workers
    ready = newest_version(root, builder.version)
    if ready and not (add or overwrite) and (has_all_texts(ready) or not os.access(root, os.W_OK)):
        return ready  # without a lock, which a read-only folder would refuse
    # Several jobs of a sweep may start at once and all want the data.
    with _lock(root / ".lock") as lock:
        before = newest_version(root, builder.version)
        if before:
            shutil.rmtree(before / "work", ignore_errors=True)  # of one killed at the very end
            write_missing_texts(before)
        if before and not (add or overwrite):
            return before
        _check_add(builder, root, before, add)
        # A new version with links: the old one stays readable, and no clip is stored twice.
        version = _next_version(before) if before else builder.version
        space = Workspace(root / f"incomplete.{version}")
        old, before = (before, None) if overwrite else (None, before)
        plan = _plan(builder, space, num_shards, before, overwrite)
        # Parts are written at the same time; the last step waits for those that are not finished.
        # Two locks: planning is for one process alone, writing parts for any number, finishing for
        # one after all of them.
        with _lock(root / ".shards.lock", shared=part is not None):
            if part:
                fcntl.flock(lock, fcntl.LOCK_UN)
            with waiting(f"{builder.name}: reading and checking media"):
                _write(builder, space, plan, workers, part)
            folder = space.folder if part else _finish(builder, space, plan, before)
    if old and not part:
        print(f"{builder.name}: {old} stays, remove it if no run needs it", file=sys.stderr)
    return folder


def _check_add(
    builder: VideoTextBuilder, root: pathlib.Path, before: pathlib.Path | None, add: bool
) -> None:
    check(bool(before) or not add, f"{builder.name}: nothing is prepared in {root} to add to")
    check(
        before is None or read_form(before) == builder.reencode,
        f"{before} holds media in another form: add them with its --store, --short-side, --fps, "
        "--key-frames or --quality",
    )


def _finish(
    builder: VideoTextBuilder, space: Workspace, plan: planning.Plan, before: pathlib.Path | None
) -> pathlib.Path:
    with waiting(f"{builder.name}: finishing"):
        stored = finish(builder, space, plan, before)
    counts = ", ".join(f"{split} {count}" for split, count in stored.items())
    print(f"{builder.name}: stored {counts}", file=sys.stderr)
    # The rename is the last step: a folder with this name is whole.
    folder = space.folder.rename(space.folder.with_name(space.version))
    shutil.rmtree(folder / "work")
    return folder


def _plan(
    builder: VideoTextBuilder,
    space: Workspace,
    shards: int | None,
    before: pathlib.Path | None,
    overwrite: bool,
) -> planning.Plan:
    """Return the plan that is there, or a new one; `overwrite` takes no plan of another request."""
    plan = planning.read_plan(space)
    if plan and overwrite and not planning.is_request(plan, planning.request_of(builder, shards)):
        plan = None
    if plan:
        planning.check_same_request(plan, planning.request_of(builder, shards), space.folder)
        return plan
    for leftover in itertools.chain(space.folder.parent.glob("incomplete.*_*"), [space.folder]):
        shutil.rmtree(leftover, ignore_errors=True)  # of older versions, or without a plan
    space.work.mkdir(parents=True)
    print(f"{builder.name}: preparing {space.folder.parent}", file=sys.stderr)
    with waiting(f"{builder.name}: listing clips and texts"):
        plan = planning.make_plan(builder, space, shards)
    # A repeated --add would store every clip again under new names.
    if before and planning.is_part_of(plan, before):
        shutil.rmtree(space.folder)
        raise UserError(f"{before} holds this part already: nothing is added")
    return plan


def _write(
    builder: VideoTextBuilder,
    space: Workspace,
    plan: planning.Plan,
    workers: int,
    part: tuple[int, int] | None,
) -> None:
    """Write the shards that are missing; stop early if too many examples cannot be used."""
    wanted = plan.shards()[part[0] :: part[1]] if part else plan.shards()
    # By marks on disk, not by what this process did: other machines write too.
    missing = [shard for shard in wanted if not space.mark(shard).is_file()]
    if len(missing) < len(wanted):
        kept = f"{len(wanted) - len(missing)} of {len(wanted)} shards are there"
        print(f"{builder.name}: going on, {kept}", file=sys.stderr)
    tally = Tally(planning.read_skipped(space.work / planning.SKIPPED_FILE))
    for written in write_shards(builder, space, missing, workers):
        for item in written.skipped:
            tally.add(item)
        # Checked while writing: a wrong folder of media shows after a shard, not after a day.
        if planning.are_too_many(tally.num_bad, plan.num_examples, builder.max_bad_ratio):
            # Raises after listing those of all finished shards.
            report_skipped(builder, space, plan, dict(plan.num_tasks))


def _next_version(folder: pathlib.Path) -> str:
    *first, last = parse_version(folder)
    return ".".join(map(str, (*first, last + 1)))


@contextlib.contextmanager
def _lock(path: pathlib.Path, *, shared: bool = False) -> Iterator[IO]:
    """Let one process in at a time, or any number of those that share.

    The lock ends with the process that holds it, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        # The kernel's lock: a file that marks a lock would outlive a process that is killed.
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield file
