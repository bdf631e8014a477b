"""Choose the right one of several texts for your own clips (multiple choice).

    python experiments/own/choices.py --data mine --train.init-from runs/mine_pretrain

The options are those of the data set's questions, as many as these have. Without such questions
each caption is to be found among three of other clips. Without `--train.init-from` it trains from
scratch.

Result: of six options for 12 unseen clips 1 is right (chance 2); 48 questions are too few.
Of 60 clips of moving shapes; docs/results.md has the minutes ("A newcomer's hour").
"""

from data_pipelines.schema.config import DataConfig
from data_pipelines.storage.stored import is_prepared
from experiments.own.recipes import NAME, fit_to, small
from experiments.recipes import NO_PRETRAINING
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig

OPTIONS = 4  # where the captions of other clips are wrong options


def get_config(data: str = NAME, data_dir: str = DataConfig.data_dir) -> ExperimentConfig:
    """MCM scores each option with the clip; the folder is runs/DATA_choices."""
    asked = fit_to(data, data_dir, "options").options if is_prepared(data, data_dir) else 0
    count = asked or OPTIONS
    changes = {
        **NO_PRETRAINING,
        "data.num_others": count - 1,
        "objectives.mcm": 1.0,
        "objectives.mcm_kind": "score",
        "objectives.mcm_template": " ".join(["{}"] * count),
        "evaluation.choices": count,
    }
    return small("choices", data, data_dir, "options" if asked else "captions", changes)


if __name__ == "__main__":
    main(get_config)
