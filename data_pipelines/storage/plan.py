"""The plan of a preparation: which tasks there are, and how they are cut into shards.

It is made once, before the first media file is decoded, and kept: a preparation that was
interrupted goes on by it, and several machines share one.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.media.reencode import Reencode
from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.json_files import parse_json, read_json, read_record, to_record
from data_pipelines.storage.builders.base import VideoTextBuilder
from data_pipelines.storage.shards import Shard, Workspace, num_shards, write_whole
from data_pipelines.storage.tasks import Skipped, Tally, write_tasks

PLAN_FILE = "plan.json"
PARTS_FILE = "parts.json"
SKIPPED_FILE = "skipped.jsonl"
FEW_BAD = 3  # a folder of a hundred clips may have a damaged file or two
_REQUEST_TYPES = (str, int, float, bool, pathlib.Path, Reencode)
# May change while a preparation goes on.
_NO_REQUEST = ("data_dir", "max_bad_ratio", "workers", "num_processes", "cache_dir")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tasks and shards of each split.

    `request` says what was asked for, and the state of the annotation files that were read.
    """

    request: Mapping[str, Any]
    num_examples: int  # with those that are skipped before any media are read
    num_tasks: Mapping[str, int]
    num_shards: Mapping[str, int]

    def shards(self) -> list[Shard]:
        """Return all shards, split by split."""
        return [
            Shard(split, index, count)
            for split, count in self.num_shards.items()
            for index in range(count)
        ]

    @property
    def same_inputs(self) -> bool:
        """True if every annotation file is there and says what it said when it was read."""
        return not any(
            _has_changed(pathlib.Path(path), state, if_gone=True)
            for path, state in self.request["inputs"].items()
        )


def make_plan(builder: VideoTextBuilder, space: Workspace, shards: int | None) -> Plan:
    """List all tasks, and stop at once if too many media are missing.

    Args:
      builder: what to prepare.
      space: an empty workspace; gets the tasks and the builder's notes.
      shards: the number of shards of each split; None: by size.

    Raises:
      UserError: more examples are missing than `max_bad_ratio` allows, or a whole split is.
    """
    request = request_of(builder, shards)
    tally, counts = Tally(), {}
    with (space.folder / SKIPPED_FILE).open("w", encoding="utf-8") as file:

        def note(item: Skipped) -> None:
            tally.add(item)
            file.write(json.dumps(dataclasses.asdict(item)) + "\n")

        # All annotations are read before any media: what is missing shows within minutes.
        for split, items in builder.examples().items():
            counts[split] = write_tasks(
                space.work,
                split,
                items,
                note,
                drop_repeats=builder.drop_repeats,
                shuffled=builder.shuffled,
            )
    num_tasks = {split: count for split, (count, _) in counts.items()}
    # Skipped ones count in the total, or the share of bad ones would be too large.
    num_examples = sum(num_tasks.values()) + tally.num_bad
    check_bad_ratio(builder, tally, num_examples, space)
    check_not_empty(builder, num_tasks, tally)
    for name, text in builder.notes().items():
        (space.folder / name).write_text(text, "utf-8")
    cut = {
        split: min(shards, count) if shards else num_shards(count, num_bytes)
        for split, (count, num_bytes) in counts.items()
    }
    inputs = {"inputs": _state(builder.inputs())}
    plan = Plan(request | inputs, num_examples, num_tasks, cut)
    (space.folder / SKIPPED_FILE).replace(space.work / SKIPPED_FILE)
    # Last, and whole: a plan that is there is complete, with all files that it speaks of.
    write_whole(space.work / PLAN_FILE, json.dumps(dataclasses.asdict(plan), indent=1))
    return plan


def read_plan(space: Workspace) -> Plan | None:
    """Read the plan of a preparation that was begun; None if there is none."""
    path = space.work / PLAN_FILE
    return read_record(Plan, path) if path.is_file() else None


def read_skipped(path: pathlib.Path) -> Iterator[Skipped]:
    """Yield the lines of a file of skipped examples."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            yield to_record(Skipped, parse_json(line, place), place)


def request_of(builder: VideoTextBuilder, shards: int | None) -> dict[str, Any]:
    """Return the settings on which the prepared bytes depend, as JSON would hold them."""
    settings = {"builder": type(builder).__name__, "num_shards": shards}
    for name, value in vars(builder).items():
        # Only what changes stored bytes: other workers or another limit may go on with the work.
        if name.startswith("_") or name in _NO_REQUEST:
            continue
        if isinstance(value, Mapping) and all(
            isinstance(v, _REQUEST_TYPES) for v in value.values()
        ):
            settings[name] = {key: str(v) for key, v in value.items()}
        elif isinstance(value, _REQUEST_TYPES):
            settings[name] = str(value)
    return settings


def is_request(plan: Plan, request: Mapping[str, Any]) -> bool:
    """Return True if a plan was made by a request, and its inputs are what they were."""
    own = {name: value for name, value in plan.request.items() if name != "inputs"}
    return own == request and plan.same_inputs


def check_same_request(plan: Plan, request: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Refuse to go on with a preparation that was begun in another way.

    Raises:
      UserError: a setting or an annotation file differs; names it.
    """
    for name in sorted((request.keys() | plan.request.keys()) - {"inputs"}):
        old, new = plan.request.get(name), request.get(name)
        check(
            old == new,
            f"{folder} was begun with {name}={old}, not {new}: give the same options to go on, or "
            "remove that folder",
        )
    check(
        plan.same_inputs,
        f"the annotation files have changed since {folder} was begun; remove that folder",
    )


def check_same_set(builder: VideoTextBuilder, folder: pathlib.Path) -> None:
    """Refuse a prepared folder no part of which was made from these inputs.

    The form of the media and the number of shards do not count, nor inputs that are gone by now.
    Folders of older versions do not say what they were made from.

    Raises:
      UserError: names what differs, and says how to go on.
    """
    wanted = request_of(builder, None)
    del wanted["num_shards"]
    wanted.pop("reencode", None)

    def differences(part: dict) -> list[str]:
        inputs = part.get("inputs", {})
        return [
            *(
                f"{k}={part.get(k)}, not {v}"
                for k, v in wanted.items()
                if not _same(part.get(k), v)
            ),
            *(
                f"{path} has changed since"
                for path, state in inputs.items()
                if _has_changed(pathlib.Path(path), state)
            ),
        ]

    found = min(map(differences, _read_parts(folder)), key=len, default=[])
    check(
        not found,
        f"{folder} holds another set ({'; '.join(found)}): prepare it again with --overwrite, add "
        "these clips with --add, or give another name or --data-dir",
    )


def _same(old: Any, new: Any) -> bool:
    """Compare settings; paths by the files that they name."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return old.keys() == new.keys() and all(_same(old[name], new[name]) for name in old)
    if isinstance(old, str) and isinstance(new, str):
        return old == new or os.path.realpath(old) == os.path.realpath(new)
    return old == new


def note_part(space: Workspace, plan: Plan, before: pathlib.Path | None) -> None:
    """Note what a prepared folder was made from: the request of each part."""
    parts = [*(_read_parts(before) if before else []), plan.request]
    (space.folder / PARTS_FILE).write_text(json.dumps(parts, indent=1), "utf-8")


def is_part_of(plan: Plan, folder: pathlib.Path) -> bool:
    """Return True if a part of a prepared folder was made by the same request."""
    return any(_is_same_part(plan.request, part) for part in _read_parts(folder))


def _is_same_part(request: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Compare requests; of the files of two the time of change does not count."""

    def timeless(inputs: Mapping[str, list]) -> dict[str, list]:
        return {path: [size, *more[1:]] for path, (size, *more) in inputs.items()}

    one, other = ({**x, "inputs": timeless(x.get("inputs", {}))} for x in (request, part))
    return one == other


def _read_parts(folder: pathlib.Path) -> list[dict]:
    path = folder / PARTS_FILE  # older versions made none
    parts = read_json(path, list) if path.is_file() else []
    good = all(isinstance(x, dict) and isinstance(x.get("inputs", {}), dict) for x in parts)
    check(good, f"{path}: must hold objects")
    return parts


def check_bad_ratio(
    builder: VideoTextBuilder, tally: Tally, total: int, space: Workspace
) -> str | None:
    """Return a message if examples were skipped.

    Raises:
      UserError: they are more than `max_bad_ratio` allows.
    """
    message = f"{builder.name}: {tally.num_bad} of {total} examples cannot be used{tally.why()}"
    if are_too_many(tally.num_bad, total, builder.max_bad_ratio):
        raise UserError(
            f"{message}; more than --max-bad-ratio {builder.max_bad_ratio} allows; see "
            f"{space.folder / SKIPPED_FILE}"
        )
    return message if tally.num_bad else None


def are_too_many(num_bad: int, total: int, max_ratio: float) -> bool:
    """Return True if the share is too large.

    A few, up to a tenth of all, never are, unless the ratio is 0.

    >>> are_too_many(2, 91, 0.01), are_too_many(4, 91, 0.01), are_too_many(1, 91, 0.0)
    (False, True, True)
    """
    few = min(FEW_BAD, total / 10) if max_ratio else 0
    return num_bad > max(max_ratio * total, few)


def check_not_empty(builder: VideoTextBuilder, counts: Mapping[str, int], tally: Tally) -> None:
    """Refuse a split without any example.

    Raises:
      UserError: there is one; names it.
    """
    for split, count in counts.items():
        check(count > 0, f"{builder.name}: split {split!r} has no usable example{tally.why()}")


def _state(paths: Iterable[pathlib.Path]) -> dict[str, list[int | str]]:
    """Return size, time of change and digest of each file that is there."""
    stats = {path: path.stat() for path in paths if path.is_file()}
    return {
        str(path): [stat.st_size, stat.st_mtime_ns, _digest(path)] for path, stat in stats.items()
    }


def _has_changed(path: pathlib.Path, state: Sequence[int | str], *, if_gone: bool = False) -> bool:
    """Return True if a file says something else than when its state was taken.

    Args:
      path: the file.
      state: see `_state`; those of older versions have no digest.
      if_gone: the result for a file that is not there.
    """
    if not path.is_file():
        return if_gone
    size, time, *digest = state
    stat = path.stat()
    # The file is read again only where its time differs: it may have gigabytes, and a copy or a
    # checkout of the same text is no change.
    if [stat.st_size, stat.st_mtime_ns] == [size, time]:
        return False
    return stat.st_size != size or digest != [_digest(path)]


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
