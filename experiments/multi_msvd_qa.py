"""Question answering on MSVD-QA as classification over answers (MuLTI).

    python -m data_pipelines.prepare msvd_qa --manual-dir DIR
    python experiments/multi_msvd_qa.py

16 frames, 5e-5, 15 epochs, 2,423 answers (ALPRO's setting).

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import QUESTIONS, multi, schedule
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Questions of 40 tokens, a class for each answer."""
    return multi(
        "multi_msvd_qa",
        SourceConfig("msvd_qa", "train", num_frames=16),
        SourceConfig("msvd_qa", "test", num_frames=16),
        {
            **QUESTIONS,
            **schedule(30_933, epochs=15, warmup=0.05),
            "data.text_len": 40,
            "objectives.answer": 1.0,
            "optim.learning_rate": 5e-5,
            "data.max_classes": 2423,
            "optim.clip_norm": 20.0,
        },
    )


if __name__ == "__main__":
    main(get_config)
