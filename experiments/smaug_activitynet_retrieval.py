"""Paragraph-to-video retrieval on ActivityNet Captions, val_1 (SMAUG).

    python -m data_pipelines.prepare activitynet --manual-dir DIR
    python experiments/smaug_activitynet_retrieval.py

All sentences about a clip are one paragraph of at most 150 tokens; 10 epochs (Singularity's
setting). VTC ranks the 4,917 clips, VTM scores the best 128 again, with 12 frames.

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import schedule, smaug
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Retrieval with VTC and VTM, ten epochs."""
    return smaug(
        "smaug_activitynet_retrieval",
        SourceConfig("activitynet", "train", num_frames=4),
        SourceConfig("activitynet", "val_1", num_frames=12),
        {
            **schedule(10_009, epochs=10),
            "data.text_len": 150,
            "evaluation.rerank_top_k": 128,
        },
    )


if __name__ == "__main__":
    main(get_config)
