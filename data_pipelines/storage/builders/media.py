"""Finds the media files of a data set, whatever their endings and subfolders."""

import functools
import os
import pathlib
import stat
import threading

from data_pipelines.media.endings import MEDIA_ENDINGS, ending, is_media, stem
from data_pipelines.media.folders import walk
from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.storage.tasks import map_threads


class MediaFolder:
    """A folder of media files, each to be found by its path or by its id (ours)."""

    def __init__(self, root: pathlib.Path, *, search: bool = True):
        """Take a folder; without `search`, files are found by their exact paths only.

        Raises:
          MissingError: there is no such folder.
        """
        if not root.is_dir():
            raise MissingError(f"{root}: no such folder; it must hold the media files")
        self.root = str(root)
        self._search = search
        self._lock = threading.Lock()

    def find(self, name: str) -> tuple[str, int] | None:
        """Return path and size of the file at this path or with this stem, if there is one.

        Of several files in one folder the ending decides, in the order of `MEDIA_ENDINGS`.

        Raises:
          UserError: several folders hold such a file.
        """
        path = os.path.join(self.root, name)
        # The exact path first: reading all folders takes long, and most names are right.
        size = file_size(path)
        if size is None and self._search:
            path = self._by_stem(name)
            size = file_size(path) if path else None
        return None if size is None else (path, size)

    def _by_stem(self, name: str) -> str | None:
        with self._lock:  # one thread reads the folder, the others wait
            files = self._files
        found = files.get(stem(os.path.basename(name)), [])
        # Nobody can say which one is meant; within one folder it is the same clip in other endings.
        if len({os.path.dirname(path) for path in found}) > 1:
            raise UserError(f"{self.root}: several files for {name!r}: {', '.join(found)}")
        return min(found, key=_ending_rank, default=None)

    @functools.cached_property
    def _files(self) -> dict[str, list[str]]:
        """Paths of all media files by stem; read when the first one is searched for."""
        files: dict[str, list[str]] = {}
        for folder in walk(self.root, map_threads):
            for path in filter(is_media, folder.files):
                files.setdefault(stem(os.path.basename(path)), []).append(path)
        return files


def file_size(path: str) -> int | None:
    """Return the bytes of a file, None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    # A folder has a size, too.
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _ending_rank(path: str) -> int:
    return MEDIA_ENDINGS.index(ending(path))
