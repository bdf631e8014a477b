"""`--profile`: a trace of a few training steps, written by `jax.profiler`."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax
from jaxtyping import PyTree

from data_pipelines.records import Batch
from vlmae.speed import CompiledStep

WARMUP_STEPS = 3
TRACED_STEPS = 3


class Trace:
    """Traces a few consecutive steps of a run, once. A context manager, in which the run happens.

    The trace begins after WARMUP_STEPS steps between which nothing else happened, and ends after
    TRACED_STEPS, or sooner where something else is to come: compiling or evaluating.

    Attributes:
      folder: where the trace goes.
      notify: prints a line.
      paused: a context in which time does not count as the run's.
    """

    def __init__(
        self,
        folder: Path,
        notify: Callable[[str], None],
        paused: Callable[[], AbstractContextManager],
    ):
        self.folder, self.notify, self.paused = folder, notify, paused
        self.quiet_steps, self.traced_steps, self.running = 0, 0, False
        self.last: PyTree = None  # metrics of the last step, which may still be under way

    def run(self, step: Callable, *args: PyTree) -> PyTree:
        """Runs a step, under the trace if it is one of those to be traced."""
        if self.quiet_steps == WARMUP_STEPS and not self.traced_steps:
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=self.traced_steps):
            state, self.last = step(*args)
        self.quiet_steps += 1
        self.traced_steps += self.running
        if self.running and self.traced_steps == TRACED_STEPS:
            self._stop()
        return state, self.last

    def interrupt(self) -> None:
        """Something else than a step is to come, and shall not be traced."""
        self.quiet_steps = 0
        if self.running:
            self._stop()

    def around(self, function: Callable) -> Callable:
        """The function, which is never traced."""

        @functools.wraps(function)
        def untraced(*args, **options):
            self.interrupt()
            return function(*args, **options)

        return untraced

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.interrupt()
        if not self.traced_steps:
            self.notify(
                f"no trace was written: that takes more than {WARMUP_STEPS} steps between which "
                "nothing is compiled or evaluated"
            )

    def _start(self) -> None:
        jax.block_until_ready(self.last)
        with self.paused():
            jax.profiler.start_trace(self.folder)
        self.running = True

    def _stop(self) -> None:
        jax.block_until_ready(self.last)
        with self.paused():
            jax.profiler.stop_trace()
        self.running = False
        self.notify(
            f"traced {self.traced_steps} step(s) into {self.folder}; to look at it: "
            f"pip install xprof && xprof --port 8791 {self.folder}, then open localhost:8791"
        )


class TracedStep:
    """A compiled step that runs under a trace, and is never compiled under it."""

    def __init__(self, step: CompiledStep, trace: Trace):
        self.step, self.trace = step, trace

    def compile(self, state: PyTree, batch: Batch) -> None:
        """See `CompiledStep.compile`."""
        if not self.step.is_compiled(batch):
            self.trace.interrupt()
        self.step.compile(state, batch)

    def __call__(self, state: PyTree, batch: Batch) -> tuple[PyTree, dict]:
        """See `CompiledStep.__call__`."""
        return self.trace.run(self.step, state, batch)
