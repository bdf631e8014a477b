"""Label your own clips: a binary decision for each label that training knows.

    python experiments/own/labels.py --data mine --train.init-from runs/mine_pretrain

Clips with captions are classified together with the first one. Without `--train.init-from` it
trains from scratch.

Result: mean average precision 68.3 on 12 unseen clips (a constant score: 27.8).
Of 60 clips of moving shapes; docs/results.md has the minutes ("A newcomer's hour").
"""

from data_pipelines.schema.config import DataConfig
from experiments.own.recipes import NAME, small
from experiments.recipes import NO_PRETRAINING
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig


def get_config(data: str = NAME, data_dir: str = DataConfig.data_dir) -> ExperimentConfig:
    """One objective; the folder is runs/DATA_labels."""
    return small("labels", data, data_dir, "labels", NO_PRETRAINING | {"objectives.label": 1.0})


if __name__ == "__main__":
    main(get_config)
