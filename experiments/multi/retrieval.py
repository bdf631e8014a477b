"""MuLTI finetuned for text-to-video retrieval.

    vlmae prepare msrvtt_7k --manual-dir DIR
    python experiments/multi/retrieval.py msrvtt
    python experiments/multi/retrieval.py didemo
    vlmae evaluate runs/multi_didemo_retrieval --split test

Training uses VTC and VTM with 8 frames of each clip. VTC ranks all clips, and VTM scores the best
128 again (ours). Frames, text lengths, batches, learning rates and epochs are ALPRO's, the system
MuLTI builds on. Training is watched on `val`, and `test` is evaluated afterwards; MSR-VTT's 1k-A
has no `val` and is evaluated at the end alone. Each variant names its data. docs/guide/recipes.md
has the flags for a pre-training from ViT-B/16.

Results: not yet run.
"""

from data_pipelines.schema.config import SourceConfig
from experiments.recipes import AT_THE_END, multi, schedule
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
        "test",
        schedule(epochs=5, warmup=0.1, batch_size=64)  # 8 a GPU on 8
        | AT_THE_END
        | {"data.text_len": 40, "optim.learning_rate": 2.5e-5},
    )


def didemo() -> ExperimentConfig:
    """DiDeMo, 1,004 test clips: the sentences of a clip form one paragraph of up to 50 tokens.

    vlmae prepare didemo --manual-dir DIR
    """
    return retrieval(
        "didemo",
        "didemo",
        "val",
        schedule(epochs=10, warmup=0.1, batch_size=96)  # 12 a GPU on 8
        | {"data.text_len": 50, "optim.learning_rate": 4e-5, "optim.clip_norm": 20.0},
    )


def retrieval(name: str, dataset: str, eval_split: str, changes: Changes) -> ExperimentConfig:
    """Build the config of one data set.

    Args:
      name: the variant.
      dataset: the prepared data set; its split `train` is trained on.
      eval_split: the split of the same data set to evaluate on.
      changes: what differs between the data sets, by dotted field names.
    """
    return multi(
        f"multi_{name}_retrieval",
        SourceConfig(dataset, "train", num_frames=8),
        SourceConfig("", eval_split, num_frames=8),
        changes | {"evaluation.rerank_top_k": 128, "evaluation.rerank_by": "match"},
    )


VARIANTS = {"msrvtt": msrvtt, "didemo": didemo}

if __name__ == "__main__":
    main(VARIANTS)
