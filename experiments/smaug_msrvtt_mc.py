"""Multiple choice on MSR-VTT: the right one of five captions (SMAUG).

    python -m data_pipelines.prepare msrvtt_7k --manual-dir DIR
    python experiments/smaug_msrvtt_mc.py

The questions: `python -m data_pipelines.prepare msrvtt_mc --manual-dir DIR`. Trained as retrieval
on the 7k split; each option is scored by VTM (Singularity's setting).

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import schedule, smaug
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """The retrieval model, asked for the best of five captions."""
    return smaug(
        "smaug_msrvtt_mc",
        SourceConfig("msrvtt_7k", "train", num_frames=4),
        SourceConfig("msrvtt_mc", "test", num_frames=12),
        {
            **schedule(7010 * 20, epochs=5),
            "evaluation.choices": 5,
        },
    )


if __name__ == "__main__":
    main(get_config)
