"""Question answering on ActivityNet-QA by a decoder that ranks answers (SMAUG).

    python -m data_pipelines.prepare activitynet_qa --manual-dir DIR
    python experiments/smaug_activitynet_qa.py

As `smaug_msrvtt_qa.py`: 10 epochs, 5 % of warm-up (Singularity's setting).

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import DECODED_ANSWERS, schedule, smaug
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Questions of 25 tokens, answers of 5."""
    return smaug(
        "smaug_activitynet_qa",
        SourceConfig("activitynet_qa", "train", num_frames=4),
        SourceConfig("activitynet_qa", "test", num_frames=12),
        {
            **DECODED_ANSWERS,
            **schedule(32_000, epochs=10, warmup=0.05),
        },
    )


if __name__ == "__main__":
    main(get_config)
