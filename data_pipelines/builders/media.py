"""Finds the media files of a data set, whatever their endings and subfolders."""

import os
import pathlib

VIDEO_ENDINGS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".gif")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MEDIA_ENDINGS = VIDEO_ENDINGS + IMAGE_ENDINGS


class MediaFolder:
    """A folder of media files, each to be found by its path or by its id (ours)."""

    def __init__(self, root: pathlib.Path, *, search: bool = True):
        """Without `search`, files are found by their exact paths only.

        Raises:
          FileNotFoundError: there is no such folder.
        """
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; it must hold the media files")
        self.root = root
        self._files: dict[str, list[str]] | None = None if search else {}  # made when needed

    def find(self, name: str) -> pathlib.Path | None:
        """The file at this path or with this stem; None if there is none.

        Of several files in one folder the ending decides, in the order of `MEDIA_ENDINGS`.

        Raises:
          ValueError: several folders hold such a file.
        """
        if (self.root / name).is_file():
            return self.root / name
        if self._files is None:
            self._files = _scan(self.root)
        found = self._files.get(_stem(os.path.basename(name)), [])
        if len({os.path.dirname(path) for path in found}) > 1:
            raise ValueError(f"{self.root}: several files for {name!r}: {', '.join(found)}")
        return min(map(pathlib.Path, found), key=_ending_rank, default=None)


def _scan(root: pathlib.Path) -> dict[str, list[str]]:
    """Paths of all media files below a folder, by stem."""
    files: dict[str, list[str]] = {}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if _stem(name) != name:
                files.setdefault(_stem(name), []).append(os.path.join(folder, name))
    return files


def _stem(name: str) -> str:
    """A file name without its media endings; "a.mov.mp4" and "a" name the same clip."""
    stem, ending = os.path.splitext(name)
    return _stem(stem) if ending.lower() in MEDIA_ENDINGS else name


def _ending_rank(path: pathlib.Path) -> int:
    return MEDIA_ENDINGS.index(path.suffix.lower())
