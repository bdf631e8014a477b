"""A sign of life while something takes long and says nothing by itself."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

EVERY_SECS = 4.0  # so that nobody waits for more than five
SLOW_SECS, SLOWLY_SECS = 60.0, 30.0  # after a minute, less often: log files are read, too


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@contextlib.contextmanager
def waiting(what: str, say: Callable[[str], None] = _say) -> Iterator[None]:
    """Say now and then how long the block has been at work; nothing if it ends at once.

    Args:
      what: the work, "compiling the step".
      say: takes a line, by default for stderr; called by a thread.
    """
    ended, start = threading.Event(), time.monotonic()

    def speak() -> None:
        pause = EVERY_SECS
        while not ended.wait(pause):
            secs = time.monotonic() - start
            say(f"{what}: {secs:.0f} s")
            pause = EVERY_SECS if secs < SLOW_SECS else SLOWLY_SECS

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
