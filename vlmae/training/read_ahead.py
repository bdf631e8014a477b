"""Batches on their way to the devices while a step runs."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from jaxtyping import PyTree

from data_pipelines.schema.records import Batch

AHEAD = 2  # batches on the devices, or on their way there, beside that of the running step


class ReadAhead(contextlib.AbstractContextManager):
    """Iterator that takes batches and copies them to the devices in a thread of its own.

    For eight GPUs a batch of ViT-B is 154 MB, whose copies take longer than a step; the thread that
    dispatches steps must not wait for them. Order and errors are those of the batches: an error is
    raised where its batch would have come. Also a context manager that ends the thread; the
    batches are closed by their owner, after it.
    """

    def __init__(self, batches: Iterator[Batch], put: Callable[[Batch], PyTree]):
        """Start reading.

        Args:
          batches: of host arrays.
          put: copies a batch to the devices.
        """
        self._batches, self._put = batches, put
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._pending: deque[Future] = deque(self._thread.submit(self._read) for _ in range(AHEAD))

    def _read(self) -> PyTree | None:
        batch = next(self._batches, None)  # None, since a future cannot hand on StopIteration
        if batch is None:
            return None
        with jax.profiler.TraceAnnotation("copy a batch to the devices"):
            # Waits for the copy, so that a profile shows how long it takes, and so that no more
            # than AHEAD batches are under way.
            return jax.block_until_ready(self._put(batch))

    def __iter__(self) -> Iterator[PyTree]:
        return self

    def __next__(self) -> PyTree:
        batch = self._pending[0].result()
        if batch is None:
            raise StopIteration
        self._pending.popleft()
        self._pending.append(self._thread.submit(self._read))
        return batch

    def __exit__(self, *_) -> None:
        self._thread.shutdown(cancel_futures=True)
