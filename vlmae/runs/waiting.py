"""Signs of life of a run, by its main process alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from data_pipelines.storage import waiting as storage
from vlmae.parallel.processes import print_on_main_process


def waiting(
    what: str, say: Callable[[str], None] = print_on_main_process
) -> AbstractContextManager[None]:
    """Say now and then how long the block is at work, see `data_pipelines.storage.waiting`."""
    return storage.waiting(what, say)
