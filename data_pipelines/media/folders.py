"""Files below a folder, each found once however many links lead to it."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from data_pipelines.schema.checks import visible


class Folder(NamedTuple):
    """Contents of a folder, sorted by name."""

    path: str
    files: list[str]  # paths
    folders: list[str]
    links: list[str]  # to folders


def walk(
    root: str | os.PathLike, mapping: Callable[[Callable, Iterable], Iterator] = map
) -> Iterator[Folder]:
    """Yield a folder and those below it; links are followed to folders that were not reached yet.

    Large collections often lie on other disks, so links count; but a link to a folder above, or to
    a sister, would show the same clips again. A folder that cannot be read is named on stderr.

    Args:
      root: where to begin.
      mapping: what lists several folders, say in threads.
    """
    seen: set[tuple[int, int]] = set()
    waiting, links = [os.fspath(root)], []
    while waiting or links:
        if not waiting:  # all that lies here by itself comes first, under its own name
            waiting, links = links, []
        new = [path for path in waiting if _is_new(path, seen)]
        waiting = []
        for found in mapping(_list, new):
            waiting += found.folders
            links += found.links
            yield found


def _is_new(path: str, seen: set[tuple[int, int]]) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    identity = found.st_dev, found.st_ino
    known = identity in seen
    seen.add(identity)
    return not known


def _list(path: str) -> Folder:
    files, folders, links = [], [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.is_dir():
                    files.append(entry.path)
                elif entry.is_symlink():
                    links.append(entry.path)
                else:
                    folders.append(entry.path)
    except OSError as error:
        print(visible(f"{path}: this folder cannot be read: {error.strerror}"), file=sys.stderr)
    return Folder(path, sorted(files), sorted(folders), sorted(links))
