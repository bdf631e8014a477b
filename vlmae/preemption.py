"""Being told to end: SIGTERM or SIGUSR1 saves at the next step and asks to be started again.

A scheduler sends them when it wants the machine back, or shortly before a time limit.
"""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

from vlmae.child_process import PREEMPTED, PREEMPTION_SIGNALS


class Preempted(SystemExit):
    """Ends the process with exit code PREEMPTED; its work is saved."""

    def __init__(self):
        super().__init__(PREEMPTED)


class PreemptionNotice:
    """Whether this run was told to end; a context manager that restores the old signal handlers.

    With several processes a signal to any of them counts, and all learn of it at the same step:
    jax.distributed listens to SIGTERM and agrees on a step that no process has passed, so SIGUSR1
    is handed on to it as that.
    """

    def __enter__(self):
        self.noticed = False
        several = jax.process_count() > 1
        self.handled = (signal.SIGUSR1,) if several else PREEMPTION_SIGNALS
        handle = _hand_on if several else self._note
        self.previous = {number: signal.signal(number, handle) for number in self.handled}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def agreed(self, step: int) -> bool:
        """True if all processes are to save this step and end; to be asked once at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.noticed

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.noticed = True


def _hand_on(number: int, frame: FrameType | None) -> None:
    del number, frame
    signal.raise_signal(signal.SIGTERM)
