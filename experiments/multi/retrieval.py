"""MuLTI finetuned for text-to-video retrieval.

    vlmae prepare msrvtt_7k --manual-dir DIR
    python experiments/multi/retrieval.py msrvtt

Training uses VTC and VTM with 8 frames of each clip. VTC ranks all test clips, and VTM scores the
best 128 again (ours). Frames, text lengths, learning rates and epochs are ALPRO's, the system MuLTI
builds on. Each variant names the data that it needs.

Results: not yet run.
"""

from data_pipelines.schema.config import SourceConfig
from experiments.recipes import multi, schedule
from experiments.sweeps import Changes
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig


def msrvtt() -> ExperimentConfig:
    """MSR-VTT: 7,010 training clips of 20 captions, the 1,000 test clips of the 1k-A split.

    vlmae prepare msrvtt_7k --manual-dir DIR
    """
    return retrieval(
        "msrvtt",
        "msrvtt_7k",
        schedule(epochs=5, warmup=0.05) | {"data.text_len": 40, "optim.learning_rate": 2.5e-5},
    )


def didemo() -> ExperimentConfig:
    """DiDeMo, 1,004 test clips: the sentences of a clip form one paragraph of up to 50 tokens.

    vlmae prepare didemo --manual-dir DIR
    """
    return retrieval(
        "didemo",
        "didemo",
        schedule(epochs=10, warmup=0.05)
        | {"data.text_len": 50, "optim.learning_rate": 4e-5, "optim.clip_norm": 20.0},
    )


def retrieval(name: str, dataset: str, changes: Changes) -> ExperimentConfig:
    """Build the config of one data set.

    Args:
      name: the variant.
      dataset: the prepared data set.
      changes: what differs between the data sets, by dotted field names.
    """
    return multi(
        f"multi_{name}_retrieval",
        SourceConfig(dataset, "train", num_frames=8),
        SourceConfig("", "test", num_frames=8),
        changes | {"evaluation.rerank_top_k": 128, "evaluation.rerank_by": "match"},
    )


VARIANTS = {"msrvtt": msrvtt, "didemo": didemo}

if __name__ == "__main__":
    main(VARIANTS)
