"""Processes that end when the one that started them is gone. Imports nothing heavy."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # save, and end with PREEMPTED
ENDS_WITH_PARENT = "VLMAE_ENDS_WITH_PARENT"
SAVE_SECS = 60  # time to save between the end of the parent and SIGKILL


def start_child(
    command: Sequence[str], env: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Starts a command that ends when this process does, even by SIGKILL, and its workers too.

    The sign is its standard input, which ends when this process is gone. The command has a process
    group of its own, so that a Ctrl-C comes this way too and not from the terminal.

    Args:
      command: calls `end_with_parent` when it starts.
      env: set in the command's environment, on top of this process's.
    """
    env = os.environ | (env or {}) | {ENDS_WITH_PARENT: "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, process_group=0)


def run_child(command: Sequence[str]) -> int:
    """Runs a command as `start_child` does; returns its exit code."""
    with start_child(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.stdin.close()
            process.wait()
            raise


def end_with_parent() -> None:
    """In a process that `start_child` made: ends it and its workers when the parent is gone."""

    def wait_for_end() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # it saves, if it can already, and ends its workers
        time.sleep(SAVE_SECS)
        os.killpg(0, signal.SIGKILL)

    if os.environ.pop(ENDS_WITH_PARENT, ""):
        threading.Thread(target=wait_for_end, daemon=True).start()


def describe_exit(code: int) -> str:
    """What an exit code says, where the process itself left no message."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name} (out of memory, perhaps)"
    if code == 0:
        return "ended without a result: was the experiment file changed while it ran?"
    return f"ended with exit code {code}"
