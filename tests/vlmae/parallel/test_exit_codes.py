"""How a process leaves that is told to end, whatever it does at that moment."""

import signal
import subprocess
import sys

import pytest

from vlmae.parallel.exit_codes import INTERRUPTED, PREEMPTED

IN_A_CALLBACK = """
import gc, signal, sys, time
import vlmae.cli
from vlmae.parallel.exit_codes import raise_at_ctrl_c

if "command" in sys.argv:
    raise_at_ctrl_c()
sent = []
def callback(phase, info):
    if not sent:
        sent.append(True)
        signal.raise_signal(int(sys.argv[1]))  # Python drops what a handler raises here

gc.callbacks.append(callback)
gc.collect()
time.sleep(30)
"""
TWICE = """
import signal, sys
from vlmae.parallel.preemption import PreemptionNotice

with PreemptionNotice() as notice:
    notice.has_work = True
    signal.raise_signal(signal.SIGINT)
    assert notice.agreed() and notice.exit().code == 130
    print("saving", flush=True)
    signal.raise_signal(signal.SIGINT)
    print("not reached", flush=True)
"""
IN_A_WORKER = """
import multiprocessing, os, signal, sys, time
import vlmae.cli

def work(queue):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.raise_signal(number)
    queue.put("lives")

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=work, args=(queue,))
    worker.start()
    print(queue.get(timeout=20))
    worker.join()
"""


def run(script: str, *arguments: object, file=None) -> tuple[int, str, str]:
    command = [sys.executable, *([file] if file else ["-c", script]), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("number", "code", "kind"),
    [
        (signal.SIGTERM, PREEMPTED, "experiment"),
        (signal.SIGUSR1, PREEMPTED, "experiment"),
        (signal.SIGINT, INTERRUPTED, "experiment"),
        (signal.SIGINT, INTERRUPTED, "command"),
    ],
)
def test_a_signal_that_falls_into_a_callback_is_not_lost(number, code, kind):
    expected = (code, "", f"told to end by {number.name}\n")
    assert run(IN_A_CALLBACK, int(number), kind) == expected


def test_a_second_ctrl_c_ends_at_once():
    assert run(TWICE) == (INTERRUPTED, "saving\n", "")


def test_data_workers_leave_it_to_their_parent(tmp_path):
    """A terminal sends Ctrl-C to all processes, and the parent needs a batch to save a step."""
    file = tmp_path / "experiment.py"
    file.write_text(IN_A_WORKER)
    assert run("", file=file) == (0, "lives\n", "")
