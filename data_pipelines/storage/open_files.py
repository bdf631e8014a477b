"""The limit of open files of a process, and what training needs of it."""

import resource

from data_pipelines.schema.checks import UserError

MAX_READERS = 1024  # each holds about 0.1 MiB
_OF_PROCESS = 100  # libraries, logs and pipes of a process
_OF_WORKER = 50  # pipes of each worker process, and the shared memory of its batches
_FEWEST_READERS = 16


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one, and return it."""
    # The soft limit is often 1024, less than the shards of a large set.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # macOS: the hard limit may be above what is allowed
            return soft
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


def max_readers() -> int:
    """Return how many shards a process keeps open: a third of the files that it may."""
    return min(MAX_READERS, raise_limit() // 3)  # a shard may have two files


def check_open_files(num_workers: int) -> None:
    """Compare the limit with what training will open, before anything is compiled.

    Raises:
      UserError: it is too low; says what would do.
    """
    limit = raise_limit()
    # Three times the fewest readers: `max_readers` takes a third of the limit.
    needed = _OF_PROCESS + _OF_WORKER * num_workers + 3 * _FEWEST_READERS
    if limit < needed:
        raise UserError(
            f"the limit of open files is {limit}, but training with data.num_workers="
            f"{num_workers} needs {needed}: raise it (ulimit -n {needed}), or use fewer workers"
        )
