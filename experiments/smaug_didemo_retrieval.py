"""Paragraph-to-video retrieval on DiDeMo (SMAUG).

    python -m data_pipelines.prepare didemo --manual-dir DIR
    python experiments/smaug_didemo_retrieval.py

All sentences about a clip are one paragraph of at most 64 tokens; 10 epochs (Singularity's
setting). VTC ranks the 1,004 test clips, VTM scores the best 128 again, with 12 frames.

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import schedule, smaug
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Retrieval with VTC and VTM, ten epochs."""
    return smaug(
        "smaug_didemo_retrieval",
        SourceConfig("didemo", "train", num_frames=4),
        SourceConfig("didemo", "test", num_frames=12),
        {
            **schedule(8395, epochs=10),
            "data.text_len": 64,
            "evaluation.rerank_top_k": 128,
        },
    )


if __name__ == "__main__":
    main(get_config)
