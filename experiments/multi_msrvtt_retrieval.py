"""Text-to-video retrieval on MSR-VTT, 1k-A test split (MuLTI).

    python -m data_pipelines.prepare msrvtt_7k --manual-dir DIR
    python experiments/multi_msrvtt_retrieval.py

8 frames, 40 tokens, 2.5e-5, 5 epochs over all captions (ALPRO's setting). VTC ranks the 1,000 test
clips, VTM scores the best 128 again (ours).

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import multi, schedule
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Retrieval with VTC and VTM, five epochs."""
    return multi(
        "multi_msrvtt_retrieval",
        SourceConfig("msrvtt_7k", "train", num_frames=8),
        SourceConfig("msrvtt_7k", "test", num_frames=8),
        {
            **schedule(7010 * 20, epochs=5, warmup=0.05),
            "data.text_len": 40,
            "optim.learning_rate": 2.5e-5,
            "evaluation.rerank_top_k": 128,
        },
    )


if __name__ == "__main__":
    main(get_config)
