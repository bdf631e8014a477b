"""Child processes that end with their parent, even after SIGKILL. Imports nothing heavy."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from vlmae.parallel.exit_codes import PREEMPTED, PREEMPTION_SIGNALS

ENDS_WITH_PARENT = "VLMAE_ENDS_WITH_PARENT"
SAVE_SECS = 60  # for a checkpoint, between the end of the parent and SIGKILL


def start_child(
    command: Sequence[str], env: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a command that ends when this process does, even by SIGKILL, with its workers.

    The command notices by its standard input, which closes with this process. It has a process
    group of its own, so that Ctrl-C reaches it from here and not from the terminal as well.

    Args:
      command: a program that calls `end_with_parent` when it starts.
      env: variables on top of this process's environment.
    """
    # A pipe, since the kernel closes it however this process ends, by SIGKILL too.
    env = os.environ | (env or {}) | {ENDS_WITH_PARENT: "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, process_group=0)


def run_child(command: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Run a command as `start_child` does, and tell it to end when this process is told.

    Returns:
      Its exit code. A command that dies of a signal of preemption, because it had no handler yet,
      counts as PREEMPTED too: its earlier checkpoints are whole.

    Raises:
      KeyboardInterrupt: Ctrl-C, after the command has ended; a second one kills it.
    """
    with start_child(command, env) as process, passed_on(process) as received:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.stdin.close()  # type: ignore[union-attr]  # always a pipe
            try:
                process.wait()
            except KeyboardInterrupt:
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return PREEMPTED if -code in received else code


@contextlib.contextmanager
def passed_on(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Forward preemption signals to a process within the block; yields the list of those received.

    Submitit's handlers, or ours, are replaced meanwhile.
    """
    received = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        del frame
        received.append(signum)
        process.send_signal(signum)

    # Set before the wait: without a handler the signal would end this process and not the run.
    before = {signum: signal.signal(signum, pass_on) for signum in PREEMPTION_SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_with_parent() -> None:
    """End this process and its workers when its parent ends, if `start_child` started it."""

    def wait_for_end() -> None:
        while os.read(0, 1):
            pass  # nothing is ever written: only the end of the pipe returns b""
        os.kill(os.getpid(), signal.SIGTERM)  # training saves a checkpoint and ends its workers
        time.sleep(SAVE_SECS)
        os.killpg(0, signal.SIGKILL)  # with its data workers, which share its group

    # Removed, since children of this process, such as data workers, have another standard input.
    if os.environ.pop(ENDS_WITH_PARENT, ""):
        threading.Thread(target=wait_for_end, daemon=True).start()


def describe_exit(code: int) -> str:
    """Describe an exit code, for a process that left no message of its own."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name} (out of memory, perhaps)"
    if code == 0:
        return "ended without a result: was the experiment file changed while it ran?"
    return f"ended with exit code {code}"
