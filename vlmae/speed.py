"""Throughput, data wait, operations and memory of a running loop."""

import contextlib
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from data_pipelines.records import Batch
from vlmae.analysis.collectives import collective_bytes, describe_bytes
from vlmae.processes import wait_for_all

MATRIX_TIMINGS = 5  # the best of so many counts


class CompiledStep:
    """A step compiled once for each shape of batch.

    Images (t = 1) and clips are two programs, compiled when first met. `operations` says how many
    operations a clip of so many frames takes (`analysis.operations`).
    """

    def __init__(
        self,
        step: Callable,
        operations: Callable[[int], int],
        notify: Callable[[str], None] = print,
    ):
        self.step, self.operations, self.notify = step, operations, notify
        self.programs: dict[tuple, tuple[Callable, dict[str, float]]] = {}

    def is_compiled(self, batch: Batch) -> bool:
        """True if the program for this shape of batch is there."""
        return batch.video.shape in self.programs

    def compile(self, state: PyTree, batch: Batch) -> None:
        """Compiles the program for this shape of batch, unless it is there already.

        Of several processes none goes on before all have compiled it.
        """
        shape = batch.video.shape
        if self.is_compiled(batch):
            return
        start = time.perf_counter()
        program = self.step.lower(state, batch).compile()
        secs = time.perf_counter() - start
        flops = float(self.operations(shape[1]))
        cost = f"{flops / 1e9:.2f} billion operations a clip"
        figures = {"speed/flops_per_clip": flops}
        if jax.device_count() > 1:
            moved = collective_bytes(program.as_text())
            cost += f"; each device exchanges {describe_bytes(moved)} a step"
            figures["speed/network_bytes"] = float(sum(moved.values()))
        self.programs[shape] = program, figures
        wait_for_all()
        self.notify(f"compiled the step for video {shape} in {secs:.1f} s: {cost}")

    def __call__(self, state: PyTree, batch: Batch) -> tuple[PyTree, dict]:
        """Runs the step.

        Metrics gain `speed/flops_per_clip`, and with several devices `speed/network_bytes`, what
        each of them gets by collectives in a step.
        """
        program, figures = self.programs[batch.video.shape]
        state, metrics = program(state, batch)
        return state, metrics | figures


def measure_matrix_rate(dtype: str) -> float:
    """Operations per second in large matrix products: this process's first device, times all.

    A product of 1024 x 1024 matrices on a CPU, 8192 x 8192 elsewhere; the best of several times.

    Args:
      dtype: type of the matrices, that of the model's activations.
    """
    device = jax.local_devices()[0]
    size, in_a_row = (1024, 1) if device.platform == "cpu" else (8192, 10)
    with jax.default_device(device):
        # Noise: zeros would need less power, and let some chips run faster than a model ever does.
        matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()  # compiles
    best = min(_seconds(product, matrix, in_a_row) for _ in range(MATRIX_TIMINGS))
    return 2 * size**3 / best * jax.device_count()


def _seconds(product: Callable, matrix: Array, in_a_row: int) -> float:
    """Seconds of one product, of so many that are started one after the other without waiting."""
    start = time.perf_counter()
    for _ in range(in_a_row):
        result = product(matrix, matrix)
    result.block_until_ready()
    return (time.perf_counter() - start) / in_a_row


def matrix_rate_share(report: dict[str, float], matrix_rate: float) -> float:
    """The operations per second of a `Meter.report`, as a share of the devices' `matrix_rate`."""
    return report["speed/flops_per_clip"] * report["speed/clips_per_sec"] / matrix_rate


class Meter:
    """Means of the metrics since the last report, with speed and memory."""

    def __init__(self):
        self._reset()
        self.is_paused = False

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
        """Time spent in here (compilation, evaluation) is not part of the report; a pause within
        a pause is part of it."""
        start, within, self.is_paused = time.perf_counter(), self.is_paused, True
        yield
        self.is_paused = within
        if not within:
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
