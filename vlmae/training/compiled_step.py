"""The training step as a program: compiled for each shape of batch, and profiled (`--profile`)."""

import functools
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import jax
from jaxtyping import PyTree

from data_pipelines.schema.records import Batch
from vlmae.parallel.malloc import return_freed_memory
from vlmae.parallel.processes import wait_for_all
from vlmae.runs.waiting import waiting
from vlmae.training.step_cost import collective_bytes, count_flops, describe_bytes, sum_flops

WARMUP_STEPS = 3  # queues fill and caches warm up in the first steps
TRACED_STEPS = 3


@dataclass
class CompiledStep:
    """Training step, compiled once for each shape of batch.

    Images (t = 1) and clips are two programs, each compiled when it is first needed.
    """

    step: Callable  # of a state, a batch and `values`
    values: PyTree = None  # the same in all steps, see `vlmae.training.step.RunValues`
    notify: Callable[[str], None] = print
    programs: dict[tuple, tuple[Callable, dict[str, float]]] = field(default_factory=dict)
    calls: Counter[tuple] = field(default_factory=Counter)  # of each program

    def is_compiled(self, batch: Batch) -> bool:
        """Return True if the program for this shape of batch exists."""
        return batch.video.shape in self.programs

    def compile(self, state: PyTree, batch: Batch) -> None:
        """Compile the program for this shape of batch, unless it exists.

        Waits for all processes, since the first collective of a step is less patient.
        """
        shape = batch.video.shape
        if self.is_compiled(batch):
            return
        start = time.perf_counter()
        # Traced once: FLOPs are read from the same trace that is compiled.
        with waiting(f"tracing the step for video {shape}", self.notify):
            traced = self.step.trace(state, batch, self.values)
            flops = sum_flops(count_flops(traced.jaxpr)).total / shape[0]
        cost = f"{flops / 1e9:.2f} GFLOPs a clip"
        # Before compiling, which may take minutes: whoever sees too large a cost can stop here.
        self.notify(f"compiling the step for video {shape}: {cost}")
        with waiting(f"compiling the step for video {shape}", self.notify):
            program = traced.lower().compile()
        del traced
        return_freed_memory()
        secs = time.perf_counter() - start
        figures = {"speed/flops_per_clip": flops}
        if jax.device_count() > 1:  # one device exchanges nothing
            moved = collective_bytes(program.as_text())
            cost += f"; each device exchanges {describe_bytes(moved)} a step"
            figures["speed/network_bytes"] = float(sum(moved.values()))
        self.programs[shape] = program, figures
        wait_for_all()
        self.notify(f"compiled the step for video {shape} in {secs:.1f} s: {cost}")

    def __call__(self, state: PyTree, batch: Batch) -> tuple[PyTree, dict]:
        """Run the step.

        Metrics gain `speed/flops_per_clip`, and with several devices `speed/network_bytes`, the
        bytes that each of them gets by collectives in a step.
        """
        program, figures = self.programs[batch.video.shape]
        # On a CPU a step's temporary arrays are one block. Once arrays of a batch lie in what the
        # first step freed, the second needs another one: the first goes back to the kernel.
        if self.calls[batch.video.shape] == 1:
            return_freed_memory()
        self.calls[batch.video.shape] += 1
        state, metrics = program(state, batch, self.values)
        return state, metrics | figures


@dataclass
class Trace(AbstractContextManager):
    """Profile of a few consecutive steps of a run; a context manager around the run.

    It begins after WARMUP_STEPS steps with nothing between them, and ends after TRACED_STEPS, or
    sooner if compiling or evaluating interrupts it.
    """

    folder: Path  # where the profile is written
    notify: Callable[[str], None]  # prints a line
    paused: Callable[[], AbstractContextManager]  # in which time does not count as the run's
    quiet_steps: int = 0
    traced_steps: int = 0
    running: bool = False
    last: PyTree = None  # metrics of the last step, which may still be running

    def run(self, step: Callable, *args: PyTree) -> PyTree:
        """Run a step, inside the profile if it is one of the TRACED_STEPS."""
        if self.quiet_steps == WARMUP_STEPS and not self.traced_steps:
            self._start()
        # Names the step in the profile, by which viewers compute times per step.
        with jax.profiler.StepTraceAnnotation("train", step_num=self.traced_steps):
            state, self.last = step(*args)
        self.quiet_steps += 1
        self.traced_steps += self.running
        if self.running and self.traced_steps == TRACED_STEPS:
            self._stop()
        return state, self.last

    def interrupt(self) -> None:
        """End the profile, because something other than a step follows."""
        self.quiet_steps = 0
        if self.running:
            self._stop()

    def around(self, function: Callable) -> Callable:
        """Wrap a function so that it interrupts the profile."""

        @functools.wraps(function)
        def untraced(*args, **options):
            self.interrupt()
            return function(*args, **options)

        return untraced

    def __exit__(self, *_):
        self.interrupt()
        if not self.traced_steps:
            self.notify(
                f"no trace was written: that takes more than {WARMUP_STEPS} steps between which "
                "nothing is compiled or evaluated"
            )

    def _start(self) -> None:
        # Steps run asynchronously: the profile must hold whole ones, and no rest of those before.
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


@dataclass
class TracedStep:
    """Compiled step that runs inside a profile; compiling interrupts it."""

    step: CompiledStep
    trace: Trace

    def compile(self, state: PyTree, batch: Batch) -> None:
        """See `CompiledStep.compile`."""
        # A profile with a compilation in it shows little else.
        if not self.step.is_compiled(batch):
            self.trace.interrupt()
        self.step.compile(state, batch)

    def __call__(self, state: PyTree, batch: Batch) -> tuple[PyTree, dict]:
        """See `CompiledStep.__call__`."""
        return self.trace.run(self.step, state, batch)
