"""Disks that are full, read-only or away: one line in place of a library's traceback."""

import contextlib
import errno
import functools
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.schema.checks import MissingError, UserError

# Libraries written in C++ put the words of the system in errors of their own types.
_PROBLEMS = [
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ESTALE)
]


@contextlib.contextmanager
def disk_errors_explained(workdir: Path) -> Iterator[None]:
    """Turn an error of the disk in the block into a UserError that names the work directory.

    Raises:
      UserError: the disk is full or read-only.
      MissingError: the work directory was there and is not any more.
    """
    _mute_other_reports()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if problem := _problem(error):
            raise UserError(
                f"{workdir} cannot be written: {problem}. What is there is whole: the same command "
                "goes on from the last checkpoint once it can be"
            ) from error
        if isinstance(error, FileNotFoundError) and not workdir.is_dir():
            raise vanished(workdir) from error
        raise


@functools.cache  # once in a process
def _mute_other_reports() -> None:
    """Leave out what threads, destructors and loggers of libraries say about a disk's errors.

    They come by the dozen for one full disk; each is raised in the main thread too.
    """
    threading.excepthook = functools.partial(_show_others, threading.excepthook)
    sys.unraisablehook = functools.partial(_show_others, sys.unraisablehook)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(
            lambda record: not (record.exc_info and _problem(record.exc_info[1]))
        )


def _show_others(show: Callable[[Any], object], args: Any) -> None:
    # The second is that of TensorBoard's thread, whose file could not be flushed.
    if not (_problem(args.exc_value) or str(args.exc_value) == "handle is closed"):
        show(args)


def _problem(error: BaseException | None) -> str:
    """Return the system's words for what is wrong with a disk; "" for any other error."""
    # With its causes: the last error may only say that a thread has failed.
    text = "".join(traceback.format_exception(error)) if error else ""
    return next((words for words in _PROBLEMS if words in text), "")


def check_there(workdir: Path) -> None:
    """Check that a run's work directory still exists, before libraries would make it anew.

    Raises:
      MissingError: it does not, or is another one.
    """
    if not (workdir / "config.json").is_file():
        raise vanished(workdir)


def vanished(workdir: Path) -> MissingError:
    """Return the error of a run whose work directory is gone."""
    return MissingError(
        f"{workdir} has vanished while the run worked in it (removed, or its disk is away); the "
        "same command goes on once it is back, and else begins anew"
    )
