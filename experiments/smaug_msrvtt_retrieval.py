"""Text-to-video retrieval on MSR-VTT, 1k-A test split (SMAUG).

    python -m data_pipelines.prepare msrvtt_7k --manual-dir DIR
    python experiments/smaug_msrvtt_retrieval.py

Trained on 7,010 clips of 20 captions; an epoch is a caption each, 5 epochs (Singularity's setting).
VTC ranks the 1,000 test clips, VTM scores the best 128 again, with 12 frames.
`--data.train.0.name msrvtt_9k --data.eval.name msrvtt_9k` for the 9k training split.

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import schedule, smaug
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Retrieval with VTC and VTM, five epochs."""
    return smaug(
        "smaug_msrvtt_retrieval",
        SourceConfig("msrvtt_7k", "train", num_frames=4),
        SourceConfig("msrvtt_7k", "test", num_frames=12),
        {
            **schedule(7010 * 20, epochs=5),
            "evaluation.rerank_top_k": 128,
        },
    )


if __name__ == "__main__":
    main(get_config)
