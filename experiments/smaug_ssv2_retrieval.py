"""Label and template retrieval on Something-Something v2 (SMAUG).

    python -m data_pipelines.prepare ssv2_label --manual-dir DIR
    python experiments/smaug_ssv2_retrieval.py

Template retrieval: `--data.train.0.name ssv2_template --data.eval.name ssv2_template`; there
several clips are right for a query, and the best rank counts. 10 epochs, 25 tokens (Singularity's
setting). Clips are not mirrored, since labels name left and right.

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import schedule, smaug
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Retrieval with VTC and VTM, ten epochs."""
    return smaug(
        "smaug_ssv2_retrieval",
        SourceConfig("ssv2_label", "train", num_frames=4),
        SourceConfig("ssv2_label", "val", num_frames=12),
        {
            **schedule(168_913, epochs=10),
            "data.text_len": 25,
            "data.flip": False,
            "evaluation.rerank_top_k": 128,
        },
    )


if __name__ == "__main__":
    main(get_config)
