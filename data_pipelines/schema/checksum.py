"""SHA-256 of files: what pins a download, and tells a changed or damaged file.

A folder's `SHA256SUMS` is in the form of coreutils: `sha256sum -c SHA256SUMS` checks it by hand.
VLMAE_SKIP_CHECKSUMS=1 in the environment checks nothing, which saves a pass over huge files.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.json_files import read_text

SUMS = "SHA256SUMS"
SKIP = "VLMAE_SKIP_CHECKSUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class DamagedError(UserError):
    """A file is not what was written."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits (ours)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write the `SHA256SUMS` of all files in and below a folder; it must not have one."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing and reading release the GIL
        sums = pool.map(sha256_of, paths)
        found = [*zip(sums, paths, strict=True)]
    lines = [f"{value}  {path.relative_to(folder).as_posix()}\n" for value, path in found]
    with (folder / SUMS).open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())  # an empty one would cost the checkpoint after a loss of power


def read_sums(folder: Path) -> dict[str, str]:
    """Read the SHA-256 of each file, by its path in the folder; {} if it has no `SHA256SUMS`.

    Raises:
      DamagedError: the file is damaged.
    """
    path = folder / SUMS
    if not path.exists():
        return {}
    try:
        lines = read_text(path).splitlines()
    except UserError as error:
        raise DamagedError(str(error)) from None
    found = [_LINE.fullmatch(line) for line in lines]
    number = found.index(None) + 1 if None in found else 1
    if None in found or not found:
        raise DamagedError(f"{path}:{number}: must be a SHA-256 and a file's name")
    return {match[2]: match[1] for match in found if match}


def check_sums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with the folder's `SHA256SUMS`; does nothing if it has none, or if told so.

    Args:
      folder: with the files.
      names: of the files to check, if it lists them; None checks all.

    Raises:
      DamagedError: a file is missing, or not what was written; names the first one.
    """
    sums = {} if os.environ.get(SKIP) == "1" else read_sums(folder)
    wanted = {*(sums if names is None else names)}
    chosen = [name for name in sums if name in wanted]
    with ThreadPoolExecutor() as pool:
        found = pool.map(_sum_if_there, [folder / name for name in chosen])
        for name, value in zip(chosen, found, strict=True):
            if not value:
                raise DamagedError(f"{folder / name} is missing")
            if value != sums[name]:
                raise DamagedError(
                    f"{folder / name} is damaged: not what {SUMS} says (remove that if you have "
                    "changed the file)"
                )


def _sum_if_there(path: Path) -> str:
    try:
        return sha256_of(path) if path.is_file() else ""
    except OSError as error:  # a bad sector
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
