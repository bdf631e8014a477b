"""Atomic writes: readers find the old file or folder or the new one, never half of it."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.schema.checks import UserError


def write_whole(path: Path, text: str) -> None:
    """Replace a file atomically, so that a kill leaves the old text or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)  # without fsync, which guards against loss of power, not against a kill
    part.replace(path)  # atomic within a file system, which is why the part lies beside it


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically, indented."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Open a folder for writing that appears at `path` when the block ends without an error.

    Raises:
      UserError: `path` exists and is not an empty folder, or leftovers of a killed run are in the
        way.
    """
    path = path.expanduser().resolve()
    # A fixed name, not a random one, so that leftovers of a killed run are found and reported.
    part = path.with_name(f"{path.name}.part")
    for found in (path, part):
        if found.exists() and not (found.is_dir() and not any(found.iterdir())):
            raise UserError(f"{found} exists and is no empty folder: remove it, or name another")
    part.mkdir(parents=True, exist_ok=True)
    try:
        yield part
    except BaseException:  # Ctrl-C too: a half folder would block the next try
        shutil.rmtree(part)
        raise
    part.replace(path)  # also replaces an empty folder
