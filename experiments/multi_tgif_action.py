"""Multiple choice on TGIF-QA Action: five options (MuLTI).

    python -m data_pipelines.prepare tgif_action --manual-dir DIR
    python experiments/multi_tgif_action.py

Every option is scored with the question, as in MCM, and the five scores compete. 16 frames, 5e-5;
10 epochs are ours. Clips are not mirrored, since answers name left and right.

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import FIVE_OPTIONS, multi, schedule
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Five options of 40 tokens, scored one by one."""
    return multi(
        "multi_tgif_action",
        SourceConfig("tgif_action", "train", num_frames=16),
        SourceConfig("tgif_action", "test", num_frames=16),
        {
            **FIVE_OPTIONS,
            **schedule(20_475, epochs=10, warmup=0.05, batch_size=64),
            "data.text_len": 40,
            "data.flip": False,
            "optim.learning_rate": 5e-5,
        },
    )


if __name__ == "__main__":
    main(get_config)
