"""Preemption: after SIGTERM, SIGUSR1 or Ctrl-C save at the next step, and exit.

Schedulers send the first two when they want the machine back, or shortly before a time limit.
"""

import itertools
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from vlmae.parallel.exit_codes import ENDING_SIGNALS, INTERRUPTED, Preempted, leave

_QUESTIONS = itertools.count(1)  # jax numbers them, and all processes count alike


class PreemptionNotice:
    """Signal handlers for preemption; a context manager that restores the old ones.

    A signal is noted and read at the next step or batch. While there is nothing to save, it ends
    the process at once, and so does a second Ctrl-C.

    With several processes a signal to any of them counts, and all stop at the same step:
    jax.distributed handles SIGTERM and agrees on a step that no process has passed. So the other
    signals are raised again as SIGTERM.

    Attributes:
      has_work: there is work that a checkpoint has to keep.
    """

    def __enter__(self):
        self.has_work = self.ends = False
        self.number: int | None = None
        self.several = jax.process_count() > 1
        # SIGTERM stays with jax.distributed, whose handler spreads the notice to all processes.
        handled = [n for n in ENDING_SIGNALS if n != signal.SIGTERM or not self.several]
        if threading.current_thread() is not threading.main_thread():
            handled = []  # no other thread may set handlers
        self.previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first, self.number = self.number is None, self.number or number
        if number == signal.SIGINT and not is_first:
            os._exit(INTERRUPTED)
        if self.several:
            signal.raise_signal(signal.SIGTERM)
        elif not self.has_work:
            leave(number, frame)

    def agreed(self) -> bool:
        """Return True if all processes must save and exit; all must ask equally often."""
        if not self.several:  # there is nobody to agree with
            return self.number is not None
        # The same step for all: a checkpoint is written by all processes together.
        point = multihost_utils.reached_preemption_sync_point(next(_QUESTIONS))
        self.ends = self.ends or point  # jax says so once
        return self.ends

    def stop(self) -> None:
        """Raise Preempted if `agreed`."""
        if self.agreed():
            raise self.exit()

    def __str__(self) -> str:
        """Name the signal, or the one by which other processes are told."""
        return f"told to end by {signal.Signals(self.number or signal.SIGTERM).name}"

    def exit(self) -> Preempted:
        """Return the exception that ends this process with the code of its signal."""
        return Preempted(self.number or signal.SIGTERM)
