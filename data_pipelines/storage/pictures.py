"""The pictures of clips that are stored as frames: a file beside the records of each shard.

Records hold the heads of such clips (see `media.frames`), so a few pictures of a long clip are read
without the others.
"""

import functools
import io
import os
import pathlib

from data_pipelines.media.frames import FrameClip
from data_pipelines.storage.open_files import max_readers

FRAMES = "frames"  # media type of such a record
_SUFFIX = ".pictures"


def pictures_path(records: pathlib.Path) -> pathlib.Path:
    """Return the file with the pictures of a shard."""
    return records.with_name(records.name + _SUFFIX)


def open_frames(head: bytes, records: str) -> FrameClip:
    """Open a clip by its head, and the file of records that holds it.

    Raises:
      DecodeError: the head is damaged.
    """
    return FrameClip(head, functools.partial(_read, records + _SUFFIX))


def _read(path: str, start: int, num_bytes: int) -> bytes:
    # Held while it is read: of a file that two threads open at once, only one is kept.
    file = _files()(path)
    return os.pread(file.fileno(), num_bytes, start)


@functools.cache
def _files():
    """Return a function that opens a file, or takes one that this process opened not long ago."""

    # One that falls out is closed as soon as no thread uses it any more.
    @functools.lru_cache(maxsize=max_readers())
    def open_file(path: str) -> io.FileIO:
        return open(path, "rb", buffering=0)

    return open_file
