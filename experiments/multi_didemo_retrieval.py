"""Paragraph-to-video retrieval on DiDeMo (MuLTI).

    python -m data_pipelines.prepare didemo --manual-dir DIR
    python experiments/multi_didemo_retrieval.py

8 frames, 50 tokens, 4e-5, 10 epochs (ALPRO's setting). VTC ranks the 1,004 test clips, VTM scores
the best 128 again (ours).

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import multi, schedule
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Retrieval with VTC and VTM, ten epochs."""
    return multi(
        "multi_didemo_retrieval",
        SourceConfig("didemo", "train", num_frames=8),
        SourceConfig("didemo", "test", num_frames=8),
        {
            **schedule(8395, epochs=10, warmup=0.05),
            "data.text_len": 50,
            "optim.learning_rate": 4e-5,
            "optim.clip_norm": 20.0,
            "evaluation.rerank_top_k": 128,
        },
    )


if __name__ == "__main__":
    main(get_config)
