"""Question answering on MSR-VTT-QA as classification over answers (MuLTI).

    python -m data_pipelines.prepare msrvtt_qa --manual-dir DIR
    python experiments/multi_msrvtt_qa.py

16 frames, 5e-5, 10 epochs, the 1,500 most frequent answers (ALPRO's setting, but for the number of
answers, which is ours).

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import QUESTIONS, multi, schedule
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Questions of 40 tokens, a class for each answer."""
    return multi(
        "multi_msrvtt_qa",
        SourceConfig("msrvtt_qa", "train", num_frames=16),
        SourceConfig("msrvtt_qa", "test", num_frames=16),
        {
            **QUESTIONS,
            **schedule(158_581, epochs=10, warmup=0.05),
            "data.text_len": 40,
            "objectives.answer": 1.0,
            "optim.learning_rate": 5e-5,
            "data.max_classes": 1500,
        },
    )


if __name__ == "__main__":
    main(get_config)
