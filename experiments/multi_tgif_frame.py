"""Question answering on TGIF-QA FrameQA as classification over answers (MuLTI).

    python -m data_pipelines.prepare tgif_frame --manual-dir DIR
    python experiments/multi_tgif_frame.py

16 frames, 5e-5; 10 epochs and the number of answers (all of the training split) are ours.

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import QUESTIONS, multi, schedule
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Questions of 40 tokens, a class for each answer."""
    return multi(
        "multi_tgif_frame",
        SourceConfig("tgif_frame", "train", num_frames=16),
        SourceConfig("tgif_frame", "test", num_frames=16),
        {
            **QUESTIONS,
            **schedule(39_392, epochs=10, warmup=0.05),
            "data.text_len": 40,
            "objectives.answer": 1.0,
            "optim.learning_rate": 5e-5,
        },
    )


if __name__ == "__main__":
    main(get_config)
