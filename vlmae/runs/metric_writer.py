"""Metrics as a JSON-lines file, TensorBoard events, W&B and a line on the terminal."""

import dataclasses
import json
import math
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.fields import INT_LIMIT, shown
from data_pipelines.schema.json_files import parse_json
from vlmae.config.experiment import ExperimentConfig
from vlmae.runs.atomic_files import write_whole
from vlmae.runs.metric_registry import losses_and_accuracies

WANDB_ID = "wandb_id.txt"  # in the work directory
LARGEST = 1e300  # integers above cannot all become floats
# Names in files of earlier versions -> today's.
RENAMED = {"mcm/asked_ratio": "mcm/valid_ratio", "answer/asked_ratio": "answer/valid_ratio"}


class WandbLog:
    """Log of a run on Weights & Biases, the same one whenever the work directory continues.

    Its own environment variables apply, such as WANDB_MODE=offline. Values of steps after the last
    checkpoint stay when those steps are done again: W&B accepts no earlier steps, and the repeated
    values are equal.
    """

    def __init__(self, config: ExperimentConfig, workdir: Path):
        """Start the log, or continue it.

        Raises:
          UserError: wandb is not installed, or refuses; says why.
        """
        try:  # an extra, and slow to import
            import wandb
        except ImportError as error:
            reason = "wandb is not installed: pip install 'vlmae[wandb]'"
            raise UserError(f"train.wandb_project is set, but {reason}") from error
        try:
            self.run = wandb.init(
                project=config.train.wandb_project,
                name=workdir.resolve().name,
                id=run_id(workdir),  # with `resume`, the same log after a preemption
                resume="allow",
                dir=str(workdir),
                config=dataclasses.asdict(config),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(f"train.wandb_project: {reason}") from error

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        self.run.log(metrics, step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self.run.finish()


def open_log(config: ExperimentConfig, workdir: Path) -> WandbLog | None:
    """Open the run's log on Weights & Biases; None without `train.wandb_project`."""
    return WandbLog(config, workdir) if config.train.wandb_project else None


def run_id(workdir: Path) -> str:
    """Return the W&B id of a work directory, drawn once and kept in the directory.

    It is no function of the path: a new run at the path of a deleted one is another run.
    """
    path = workdir / WANDB_ID
    if not path.exists():
        write_whole(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()


class MetricWriter:
    """Writer of `metrics.jsonl`, TensorBoard event files and, if given, Weights & Biases.

    A continued run leaves the same file as an unbroken one: lines of steps after `start_step`, left
    by a run that was killed after its last checkpoint, are removed first, and a line that is kept
    is not written again.
    """

    def __init__(self, workdir: Path, start_step: int, wandb: WandbLog | None = None):
        """Open the files of a work directory that continues after `start_step`."""
        from tensorboardX import SummaryWriter  # imports torch where it is installed: lazily

        self.path = Path(workdir) / "metrics.jsonl"
        self.kept = set(drop_later_lines(self.path, start_step))
        self.wandb = wandb
        self.board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        line = json.dumps({"step": step, **metrics}) + "\n"
        if line in self.kept:  # a finished run that is started again repeats its last evaluation
            return
        # Opened for each line: a line is on disk before the next step, and a kill cuts one at most.
        with self.path.open("a") as file:
            file.write(line)
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.write(step, metrics)

    def lacks_evaluation(self, step: int) -> bool:
        """Return True if the evaluation of a step before the start is not on record."""
        lines = [json.loads(line) for line in self.kept]
        return not any(x["step"] == step and "speed/secs_per_step" not in x for x in lines)

    def close(self) -> None:
        """Flush the event files, and wait for Weights & Biases."""
        self.board.close()
        if self.wandb:
            self.wandb.close()


def drop_later_lines(path: Path, last_step: int) -> list[str]:
    """Remove lines of steps after `last_step` and lines cut short; return the others."""
    kept = _lines_until(path, last_step)
    if path.exists():
        write_whole(path, "".join(kept))
    return kept


def copy_metrics(source: Path, target: Path, last_step: int) -> None:
    """Begin a run's metrics with those of the run that it branches off, up to `last_step`.

    So the record and the cost of a branch are those of an unbroken run.
    """
    kept = _lines_until(source / "metrics.jsonl", last_step)
    write_whole(target / "metrics.jsonl", "".join(kept))


def read_metrics(workdir: Path) -> list[dict]:
    """Read the lines of `metrics.jsonl`, under today's names; [] without a file.

    A last line that a kill cut short is left out.

    Raises: as `parse_line`.
    """
    return [parse_line(line, place) for place, line in _whole_lines(workdir / "metrics.jsonl")]


def parse_line(line: bytes, place: str) -> dict:
    """Parse a line of metrics, under today's names.

    Raises:
      UserError: not JSON, without a step, or a value is no number; the message begins with `place`.
    """
    values = parse_json(line, place)
    check(isinstance(values, dict), f"{place}: must hold an object")
    step = values.get("step")
    check(type(step) is int and 0 <= step < INT_LIMIT, f"{place}: no step, or not a whole number")
    check_numbers(values, place)
    return {RENAMED.get(name, name): value for name, value in values.items()}


def check_numbers(values: Mapping[str, object], place: str | Path) -> None:
    """Raise UserError for a value that is neither a number, nor NaN or infinite."""
    for name, value in values.items():
        good = type(value) is float or (type(value) is int and abs(value) < LARGEST)
        check(good, f"{place}: {name} must be a number, not {shown(value)}")


def _lines_until(path: Path, last_step: int) -> list[str]:
    lines = _whole_lines(path)
    return [line.decode() for place, line in lines if parse_line(line, place)["step"] <= last_step]


def _whole_lines(path: Path) -> list[tuple[str, bytes]]:
    """Read the lines that no kill has cut short, each with its place."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    numbered = enumerate(lines, start=1)
    return [(f"{path}:{number}", line) for number, line in numbered if line.endswith(b"}\n")]


class Progress:
    """Progress bar on a terminal; elsewhere one line a report, which keeps log files readable."""

    def __init__(self, start_step: int, steps: int):
        """Start the bar at `start_step` of `steps`."""
        from tqdm import tqdm

        self.steps = steps
        self.bar = tqdm(
            total=steps, initial=start_step, unit="step", dynamic_ncols=True, disable=None
        )

    def advance(self) -> None:
        """Count one more step."""
        self.bar.update()

    def report(self, step: int, metrics: dict[str, float], guesses: Mapping[str, float]) -> None:
        """Show the losses, speed and time left; for guesses see `losses_and_accuracies`."""
        left = int((self.steps - step) * metrics["speed/secs_per_step"])
        loss = metrics.get("loss/total", math.nan)  # missing if all steps were skipped
        text = (
            f"loss {loss:.3f}  {metrics['speed/clips_per_sec']:.1f} clips/s  "
            f"data wait {metrics['speed/data_wait_share']:.0%}"
        )
        parts = losses_and_accuracies(metrics, guesses)
        if self.bar.disable:  # no terminal: a bar would fill a log file with control characters
            print(
                f"step {step}/{self.steps}  {text}  {left // 60}:{left % 60:02d} left", flush=True
            )
            if parts:
                print(f"    {parts}", flush=True)
        else:
            self.bar.set_postfix_str(text)
            if parts:
                self.print(f"step {step}: {parts}")

    def print(self, text: str) -> None:
        """Print above the bar."""
        self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


class NullWriter:
    """Writer and progress bar that do nothing, for all processes but the first."""

    def write(self, *_) -> None:
        """Do nothing."""

    lacks_evaluation = report = print = advance = close = write
