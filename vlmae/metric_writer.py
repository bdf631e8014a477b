"""Where metrics go: a JSON-lines file, TensorBoard, W&B, and one line on the terminal."""

import json
import sys
from pathlib import Path

from vlmae.files import write_whole
from vlmae.wandb_log import WandbLog


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard event files in a work directory, and
    to Weights & Biases, if it is given.

    Lines of steps after `start_step`, left by a run that was killed after its last checkpoint,
    are removed first, and a line that is kept is not written again: a continued run leaves the
    file of an unbroken one.
    """

    def __init__(self, workdir: Path, start_step: int, wandb: WandbLog | None = None):
        from tensorboardX import SummaryWriter  # imports torch where it is installed: lazily

        self.path = Path(workdir) / "metrics.jsonl"
        self.kept = set(drop_later_lines(self.path, start_step))
        self.wandb = wandb
        self.board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of a step."""
        line = json.dumps({"step": step, **metrics}) + "\n"
        if line in self.kept:  # the final evaluation of a finished run, done again
            return
        with self.path.open("a") as file:
            file.write(line)
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.write(step, metrics)

    def close(self) -> None:
        """Flushes the event files, and waits for Weights & Biases."""
        self.board.close()
        if self.wandb:
            self.wandb.close()


def drop_later_lines(path: Path, last_step: int) -> list[str]:
    """Keeps and returns the lines of steps up to `last_step`; a line cut short goes too."""
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= last_step]
    if path.exists():
        write_whole(path, "".join(kept))
    return kept


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of `metrics.jsonl`, without one that a kill cut short; none if there is no file."""
    return [json.loads(line) for line in _whole_lines(workdir / "metrics.jsonl")]


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("}\n")]


class Progress:
    """A progress bar on a terminal; elsewhere one line a report, which keeps log files readable."""

    def __init__(self, start_step: int, steps: int):
        from tqdm import tqdm

        self.steps = steps
        self.bar = tqdm(
            total=steps, initial=start_step, unit="step", dynamic_ncols=True, disable=None
        )

    def advance(self) -> None:
        """One more step is done."""
        self.bar.update()

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Shows loss, speed and time left."""
        left = int((self.steps - step) * metrics["speed/secs_per_step"])
        text = (
            f"loss {metrics['loss/total']:.3f}  {metrics['speed/clips_per_sec']:.1f} clips/s  "
            f"data wait {metrics['speed/data_wait_share']:.0%}"
        )
        if self.bar.disable:
            print(
                f"step {step}/{self.steps}  {text}  {left // 60}:{left % 60:02d} left", flush=True
            )
        else:
            self.bar.set_postfix_str(text)

    def print(self, text: str) -> None:
        """Prints above the bar."""
        self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


class Muted:
    """In the place of writer and progress in all processes but the first: says nothing."""

    def write(self, *_) -> None: ...

    report = print = advance = close = write
