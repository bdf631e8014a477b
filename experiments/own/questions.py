"""Answer open questions about your own clips, by a classifier over the answers of training.

    python experiments/own/questions.py --data mine --train.init-from runs/mine_pretrain

Without `--train.init-from` it trains from scratch.

Result: 38.9 % right on 12 unseen clips (the most frequent answer: 4.2).
Of 60 clips of moving shapes; docs/results.md has the minutes ("A newcomer's hour").
"""

from data_pipelines.schema.config import DataConfig
from experiments.own.recipes import NAME, small
from experiments.recipes import QUESTIONS
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig


def get_config(data: str = NAME, data_dir: str = DataConfig.data_dir) -> ExperimentConfig:
    """One objective; the folder is runs/DATA_questions."""
    changes = QUESTIONS | {"objectives.answer": 1.0}
    return small("questions", data, data_dir, "questions", changes)


if __name__ == "__main__":
    main(get_config)
