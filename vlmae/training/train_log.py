"""Metrics of a training loop: speed and memory, read late, checked, averaged and written."""

import contextlib
import functools
import math
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from data_pipelines.schema.checks import UserError
from vlmae.config.experiment import ExperimentConfig
from vlmae.runs.metric_writer import MetricWriter, NullWriter, Progress
from vlmae.training.optim import global_norm, learning_rate, optim_values

MATRIX_TIMINGS = 5  # the best of them counts
BAD_CLIPS_JUDGED_AFTER = 1000  # clips seen before the share of bad ones may stop a run


class NonFiniteLoss(UserError, FloatingPointError):
    """NaN or infinity in a loss, the gradient or the parameters."""


class TooManyBadClips(UserError):
    """Share of clips that could not be decoded above `data.max_bad_ratio`."""


class TrainLog:
    """Metrics of a run's steps.

    They are read one step late, so that the device never waits for the host.

    Attributes:
      meter: averages metrics and measures speed between two reports.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        start: int,
        params: PyTree,
        matrix_rate: float,
        writer: MetricWriter | NullWriter,
        progress: Progress | NullWriter,
    ):
        """Start the log after step `start`.

        Args:
          config: the resolved experiment.
          start: steps done before.
          params: the parameters, to compile their norm.
          matrix_rate: see `measure_matrix_rate`.
          writer: takes the reports.
          progress: shows them.
        """
        self.config, self.start, self.matrix_rate = config, start, matrix_rate
        self.writer, self.progress = writer, progress
        self.meter, self.bad_clips, self.pending = Meter(), 0, {}
        self.skipped = 0  # steps in a row
        self.rollbacks = 0
        values = optim_values(config.optim, config.train.steps)
        self._schedule = functools.partial(jax.jit(learning_rate), values)
        self._norm = jax.jit(global_norm)
        # Compiled here, so that the time of the first report holds steps alone.
        jax.block_until_ready((self._schedule(start), self._norm(params)))
        self.param_norm = math.nan

    def add(self, step: int, metrics: dict[str, jax.Array], *, read_now: bool) -> None:
        """Take the metrics of a step, and read those of the step before, or of both.

        Raises:
          NonFiniteLoss, TooManyBadClips: see `check_metrics`, `check_bad_clips`.
        """
        data = self.config.data
        # Arrays that may not be computed yet; `device_get` below waits for those of a step that is
        # over.
        self.pending[step] = metrics
        for settled in sorted(self.pending) if read_now else sorted(self.pending)[:-1]:
            values = jax.tree.map(float, jax.device_get(self.pending.pop(settled)))
            self.skipped = self.skipped + 1 if values.get("optim/skipped_ratio") else 0
            if 0 < self.skipped <= self.config.train.max_skipped_steps:
                values = {name: value for name, value in values.items() if math.isfinite(value)}
            # Before the mean: one NaN would hide in it until the next report, after a checkpoint.
            check_metrics(settled, values)
            self.bad_clips += round(values["data/bad_ratio"] * data.batch_size)
            self.meter.add(values, clips=data.batch_size)
        seen = (step - self.start) * data.batch_size
        total = self.config.train.steps * data.batch_size
        check_bad_clips(self.bad_clips, seen, total, data.max_bad_ratio)

    def roll_back(self) -> None:
        """Count that the run goes back to a checkpoint, and forget the steps not read yet."""
        self.rollbacks += 1
        self.skipped, self.pending = 0, {}

    def check_params(self, step: int, params: PyTree) -> None:
        """Check that all parameters are finite, before they are saved or reported.

        A finite loss does not mean that its own update is finite. Read only here, since it is a
        pass over all parameters.

        Raises:
          NonFiniteLoss: they are not.
        """
        # NaN or infinity in any parameter shows in the norm of all.
        self.param_norm = float(self._norm(params))
        check_metrics(step, {"optim/param_norm": self.param_norm})

    def report(self, step: int) -> None:
        """Write the means since the last report; `check_params` gives the norm of the step."""
        report = self.meter.report() | {
            "optim/param_norm": self.param_norm,
            "optim/learning_rate": float(self._schedule(step - 1)),
        }
        report["speed/matrix_rate_share"] = matrix_rate_share(report, self.matrix_rate)
        self.writer.write(step, report)
        self.progress.report(step, report, guesses(self.config))


def guesses(config: ExperimentConfig) -> dict[str, float]:
    """Return the accuracy in training that a guess reaches, a fraction, by objective.

    VTM has two wrong pairs for each right one, so "wrong" is right two times of three. A guess of
    VTC takes any row of the batch, one of MCM any option.
    """
    options = config.objectives.mcm_template.count("{}")
    return {"vtc": 1 / config.data.batch_size, "vtm": 2 / 3, "mcm": 1 / options}


def check_metrics(step: int, metrics: dict[str, float]) -> None:
    """Check that losses, gradients and parameters are finite.

    Raises:
      NonFiniteLoss: names the step and the metrics that are not.
    """
    bad = [
        f"{name}={value}"
        for name, value in metrics.items()
        if name.startswith(("loss/", "optim/")) and not math.isfinite(value)
    ]
    if bad:
        raise NonFiniteLoss(f"step {step}: not finite: {', '.join(bad)}")


def check_bad_clips(bad: int, seen: int, total: int, max_ratio: float) -> None:
    """Check the share of bad clips, once enough of all `total` clips were seen to judge it.

    Raises:
      TooManyBadClips: more than `max_ratio` of them could not be decoded.
    """
    if seen >= min(BAD_CLIPS_JUDGED_AFTER, total) and bad > max_ratio * seen:
        raise TooManyBadClips(
            f"{bad} of {seen} clips could not be decoded, more than "
            f"data.max_bad_ratio={max_ratio} allows (each is named above)"
        )


def measure_matrix_rate(dtype: str) -> float:
    """Measure FLOPs per second of large matrix products on one device, times the devices.

    The matrices are 1024 x 1024 on a CPU and 8192 x 8192 elsewhere; the best of several timings.

    Args:
      dtype: of the matrices, as of the model's activations.
    """
    device = jax.local_devices()[0]
    # Large enough to be bound by arithmetic; ten in a row, so that the dispatch does not count on
    # fast devices.
    size, in_a_row = (1024, 1) if device.platform == "cpu" else (8192, 10)
    with jax.default_device(device):
        # Noise, since zeros need less power, so some chips would run faster than a model ever does.
        matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()  # compiles
    best = min(_seconds(product, matrix, in_a_row) for _ in range(MATRIX_TIMINGS))
    return 2 * size**3 / best * jax.device_count()


def _seconds(product: Callable, matrix: Array, in_a_row: int) -> float:
    """Time one of `in_a_row` products that are dispatched without waiting for each other."""
    start = time.perf_counter()
    for _ in range(in_a_row):
        result = product(matrix, matrix)
    result.block_until_ready()
    return (time.perf_counter() - start) / in_a_row


def matrix_rate_share(report: dict[str, float], matrix_rate: float) -> float:
    """Divide the FLOPs per second of a `Meter.report` by the devices' `matrix_rate`."""
    return report["speed/flops_per_clip"] * report["speed/clips_per_sec"] / matrix_rate


class Meter:
    """Running means of metrics since the last report, with speed and memory."""

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
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.wait_secs += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside (compilation, evaluation) out of the report; pauses may nest."""
        start, within, self.is_paused = time.perf_counter(), self.is_paused, True
        yield
        self.is_paused = within
        if not within:
            self.started += time.perf_counter() - start

    def add(self, metrics: dict[str, float], clips: int) -> None:
        """Count one step."""
        self.steps, self.clips = self.steps + 1, self.clips + clips
        for name, value in metrics.items():
            self.sums[name] += value
            self.counts[name] += 1

    def report(self) -> dict[str, float]:
        """Return the means since the last report with `speed/*` and `memory/*`, and start anew."""
        # Wall time between reports, not the sum of steps: what runs between them is the run's too.
        secs = max(time.perf_counter() - self.started, 1e-9)  # a coarse clock may say 0
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
    """Return the peak memory of the first device, or of this process where devices report none."""
    stats = jax.local_devices()[0].memory_stats() or {}
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return stats.get("peak_bytes_in_use", kibibytes * 1024)
