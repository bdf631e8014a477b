"""Writing files and folders so that nobody ever finds half of one."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once: whenever the run is killed, the old text or the new one is there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which appears at `path` when the block ends; not at all if it fails.

    Raises:
      ValueError: `path` exists and is no empty folder, or what a killed run left is in the way.
    """
    path = path.expanduser().resolve()
    part = path.with_name(f"{path.name}.part")
    for found in (path, part):
        if found.exists() and not (found.is_dir() and not any(found.iterdir())):
            raise ValueError(f"{found} exists and is no empty folder: remove it, or name another")
    part.mkdir(parents=True, exist_ok=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part)
        raise
    part.replace(path)  # of an empty folder, too
