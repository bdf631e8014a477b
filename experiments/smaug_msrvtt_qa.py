"""Question answering on MSR-VTT-QA by a decoder that ranks answers (SMAUG).

    python -m data_pipelines.prepare msrvtt_qa --manual-dir DIR
    python experiments/smaug_msrvtt_qa.py

A three-layer decoder is trained on the answers and ranks all of the training split's: the 128 whose
first word is the likeliest, by their probability. 10 epochs, 5 % of warm-up (Singularity's
setting).

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import DECODED_ANSWERS, schedule, smaug
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Questions of 25 tokens, answers of 5."""
    return smaug(
        "smaug_msrvtt_qa",
        SourceConfig("msrvtt_qa", "train", num_frames=4),
        SourceConfig("msrvtt_qa", "test", num_frames=12),
        {
            **DECODED_ANSWERS,
            **schedule(158_581, epochs=10, warmup=0.05),
        },
    )


if __name__ == "__main__":
    main(get_config)
