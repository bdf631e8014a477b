"""Exit codes and signals of a process that is told to end. Imports no jax, as launchers read it."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, start again
INTERRUPTED = 130  # 128 + SIGINT, as shells report Ctrl-C
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # save, then exit with PREEMPTED
ENDING_SIGNALS = (*PREEMPTION_SIGNALS, signal.SIGINT)
RETRY_SECS = 0.01
before_leaving: list[Callable[[], None]] = []  # called by `leave`, the last one first


class Preempted(SystemExit):
    """Exit because a signal asked for it, after the work is saved."""

    def __init__(self, number: int = signal.SIGTERM):
        """Exit with INTERRUPTED after SIGINT, else with PREEMPTED."""
        super().__init__(code_of(number))


def code_of(number: int) -> int:
    """Return the exit code of a process that a signal tells to end."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def say_told(number: int) -> None:
    """Say on stderr which signal ends this process; safe in a signal handler."""
    # Not `print`, which fails in a handler that has interrupted it.
    os.write(2, f"told to end by {signal.Signals(number).name}\n".encode())


def leave(number: int, frame: FrameType | None = None) -> NoReturn:
    """End this process at once, as the handler of a signal while there is nothing to save.

    It raises nothing: a handler runs in the middle of anything, and an exception may be dropped in
    a callback, become an ImportError, or end the process by an abort in a library in C++.
    """
    del frame
    say_told(number)
    for function in (*reversed(before_leaving), sys.stdout.flush):
        with contextlib.suppress(Exception):
            function()
    os._exit(code_of(number))


def leave_when_told() -> None:
    """Call `leave` at signals of preemption and at Ctrl-C.

    Data workers, which import the same files, ignore the signals: schedulers and terminals send
    them to the whole process group, and the parent needs batches up to a step that it can save.
    """
    # Not by `parent_process`, which a worker does not know yet while it imports the main file.
    is_worker = multiprocessing.current_process().name != "MainProcess"
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        _set_handlers(signal.SIG_IGN if is_worker else leave)
        # At exit Python sets back every handler but this one, and a signal would change the code.
        atexit.register(_set_handlers, signal.SIG_IGN)


def raise_at_ctrl_c() -> None:
    """Raise KeyboardInterrupt at Ctrl-C from now on: for commands that clean up, and launchers."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = functools.partial(_repeat_ctrl_c, sys.unraisablehook)
        sys.excepthook = functools.partial(_without_traceback, sys.excepthook)


def _set_handlers(handler: Callable | signal.Handlers) -> None:
    for number in ENDING_SIGNALS:
        signal.signal(number, handler)


def _without_traceback(otherwise: Callable, kind: type, error: BaseException, *rest: Any) -> None:
    """Say in one line that Ctrl-C ended the process."""
    if not issubclass(kind, KeyboardInterrupt):
        otherwise(kind, error, *rest)
        return
    say_told(signal.SIGINT)
    sys.exit(INTERRUPTED)


def _repeat_ctrl_c(otherwise: Callable[[Any], None], dropped: Any) -> None:
    """Send Ctrl-C again if Python has dropped its exception.

    It drops those that are raised in a callback, say JAX's at each garbage collection, which is
    where most signals fall.
    """
    if not isinstance(dropped.exc_value, KeyboardInterrupt):
        otherwise(dropped)
        return
    # A moment later, when the callback is over.
    main = threading.main_thread().ident
    timer = threading.Timer(RETRY_SECS, signal.pthread_kill, (main, signal.SIGINT))
    timer.daemon = True
    timer.start()
