"""Throughput, data wait, operations and memory of a running loop."""

import contextlib
import math
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import jax
from jaxtyping import PyTree

from data_pipelines.records import Batch
from vlmae.analysis.collectives import collective_bytes, describe_bytes


class CompiledStep:
    """A step compiled once for each shape of batch; counts its operations while at it.

    Images (t = 1) and clips are two programs, compiled when first met. `repeats` is how often the
    step's loop over parts of the batch runs: XLA counts the operations of a loop's body once. With
    0 there are other loops, and the operations are unknown (NaN).
    """

    def __init__(self, step: Callable, notify: Callable[[str], None] = print, repeats: int = 1):
        self.step, self.notify, self.repeats = step, notify, repeats
        self.programs: dict[tuple, tuple[Callable, dict[str, float]]] = {}

    def is_compiled(self, batch: Batch) -> bool:
        """True if the program for this shape of batch is there."""
        return batch.video.shape in self.programs

    def compile(self, state: PyTree, batch: Batch) -> None:
        """Compiles the program for this shape of batch, unless it is there already."""
        shape = batch.video.shape
        if self.is_compiled(batch):
            return
        start = time.perf_counter()
        program = self.step.lower(state, batch).compile()
        counted = program.cost_analysis().get("flops", 0.0) * (self.repeats or math.nan)
        flops = counted * jax.device_count() / shape[0]
        secs = time.perf_counter() - start
        cost = f"{flops / 1e9:.2f} billion operations a clip" if self.repeats else "in a loop"
        figures = {"speed/flops_per_clip": flops}
        if jax.device_count() > 1:
            moved = collective_bytes(program.as_text())
            cost += f"; each device exchanges {describe_bytes(moved)} a step"
            figures["speed/network_bytes"] = float(sum(moved.values()))
        self.programs[shape] = program, figures
        self.notify(f"compiled the step for video {shape} in {secs:.1f} s: {cost}")

    def __call__(self, state: PyTree, batch: Batch) -> tuple[PyTree, dict]:
        """Runs the step.

        Metrics gain `speed/flops_per_clip`, as XLA counts them, and with several devices
        `speed/network_bytes`, what each of them gets by collectives in a step.
        """
        program, figures = self.programs[batch.video.shape]
        state, metrics = program(state, batch)
        return state, metrics | figures


class Meter:
    """Means of the metrics since the last report, with speed and memory."""

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.steps, self.clips, self.wait_secs = 0, 0, 0.0
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is waiting for data."""
        start = time.perf_counter()
        yield
        self.wait_secs += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here (compilation, evaluation) is not part of the report."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def add(self, metrics: dict[str, float], clips: int) -> None:
        """Counts one step."""
        self.steps, self.clips = self.steps + 1, self.clips + clips
        for name, value in metrics.items():
            self.sums[name] += value
            self.counts[name] += 1

    def report(self) -> dict[str, float]:
        """The means since the last report, `speed/*` and `memory/*`; starts anew."""
        secs = max(time.perf_counter() - self.started, 1e-9)
        means = {name: self.sums[name] / self.counts[name] for name in self.sums}
        means |= {
            "speed/secs_per_step": secs / max(self.steps, 1),
            "speed/clips_per_sec": self.clips / secs,
            "speed/data_wait_share": min(self.wait_secs / secs, 1.0),
            "memory/peak_bytes": float(peak_memory_bytes()),
        }
        self._reset()
        return means


def peak_memory_bytes() -> int:
    """Most memory used so far: on the first device, or by this process where devices do not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return stats.get("peak_bytes_in_use", kibibytes * 1024)
