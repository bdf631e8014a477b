"""Weights & Biases, if `train.wandb_project` is set. Its own variables hold: WANDB_MODE=offline."""

import dataclasses
import secrets
from pathlib import Path

from vlmae.config import ExperimentConfig
from vlmae.files import write_whole

RUN_ID = "wandb_id.txt"


class WandbLog:
    """A run on Weights & Biases, the same one whenever the work directory's run goes on.

    What it has of steps after the last checkpoint stays when those steps are done again: W&B takes
    no earlier steps, and they bring the same values.
    """

    def __init__(self, config: ExperimentConfig, workdir: Path):
        """Starts, or goes on.

        Raises:
          ValueError: wandb is not installed, or refuses; says why.
        """
        try:
            import wandb
        except ImportError as error:
            reason = "wandb is not installed: pip install 'vlmae[wandb]'"
            raise ValueError(f"train.wandb_project is set, but {reason}") from error
        try:
            self.run = wandb.init(
                project=config.train.wandb_project,
                name=workdir.resolve().name,
                id=run_id(workdir),
                resume="allow",
                dir=str(workdir),
                config=dataclasses.asdict(config),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"train.wandb_project: {reason}") from error

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of a step."""
        self.run.log(metrics, step=step)

    def close(self) -> None:
        """Waits until all is sent."""
        self.run.finish()


def open_log(config: ExperimentConfig, workdir: Path) -> WandbLog | None:
    """The run's log on Weights & Biases; None if none is asked for."""
    return WandbLog(config, workdir) if config.train.wandb_project else None


def run_id(workdir: Path) -> str:
    """The id of a work directory's run on W&B: drawn once, and kept in the directory.

    It is no function of the path: a new run in the place of a deleted one is another run.
    """
    path = workdir / RUN_ID
    if not path.exists():
        write_whole(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()
