"""SMAUG finetuned for text-to-video retrieval, and for multiple choice among five captions.

    vlmae prepare msrvtt_7k --manual-dir DIR --short-side 224 --fps 2
    python experiments/smaug/retrieval.py msrvtt
    python experiments/smaug/retrieval.py didemo
    vlmae evaluate runs/smaug_didemo_retrieval --split test

Training uses VTC and VTM with 4 frames of each clip. Evaluation uses 12: VTC ranks all clips, and
VTM scores the best 128 again. Epochs, text lengths and re-encoding are Singularity's, the system
SMAUG builds on. Training is watched on `val`, and `test` is evaluated afterwards; the data sets
without a `val` of their own are evaluated at the end alone. Each variant names its data.
docs/guide/recipes.md has the flags for a stage 2 from BEiT.

Results: not yet run.
"""

from data_pipelines.schema.config import SourceConfig
from experiments.recipes import AT_THE_END, schedule, smaug
from experiments.sweeps import Changes
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig


def msrvtt() -> ExperimentConfig:
    """MSR-VTT: 7,010 training clips of 20 captions, the 1,000 test clips of the 1k-A split.

    vlmae prepare msrvtt_7k --manual-dir DIR --short-side 224 --fps 2

    For the 9k training split: `--data.train.0.name msrvtt_9k`.
    """
    return retrieval("msrvtt", "msrvtt_7k", "test", schedule(epochs=5) | AT_THE_END)


def msrvtt_mc() -> ExperimentConfig:
    """MSR-VTT multiple choice: trained as `msrvtt`; VTM scores each of five captions.

    vlmae prepare msrvtt_7k --manual-dir DIR --short-side 224 --fps 2
    vlmae prepare msrvtt_mc --manual-dir DIR --short-side 224 --fps 2
    """
    return smaug(
        "smaug_msrvtt_mc",
        SourceConfig("msrvtt_7k", "train", num_frames=4),
        SourceConfig("msrvtt_mc", "test", num_frames=12),
        schedule(epochs=5) | AT_THE_END | {"evaluation.choices": 5},
    )


def didemo() -> ExperimentConfig:
    """DiDeMo, 1,004 test clips: the sentences of a clip form one paragraph of up to 64 tokens.

    vlmae prepare didemo --manual-dir DIR --short-side 360 --fps 2
    """
    changes = schedule(epochs=10) | {"data.text_len": 64}
    return retrieval("didemo", "didemo", "val", changes)


def activitynet() -> ExperimentConfig:
    """ActivityNet Captions, 4,917 clips of val_1: paragraphs of up to 150 tokens.

    vlmae prepare activitynet --manual-dir DIR --short-side 360 --fps 2
    """
    changes = schedule(epochs=10) | AT_THE_END | {"data.text_len": 150}
    return retrieval("activitynet", "activitynet", "val_1", changes)


def ssv2() -> ExperimentConfig:
    """Something-Something v2, by label. No mirroring: labels name left and right.

    vlmae prepare ssv2_label --manual-dir DIR

    By template: `--data.train.0.name ssv2_template`. There, several
    clips are right for a query, and the best rank counts.
    """
    changes = schedule(epochs=10) | AT_THE_END | {"data.text_len": 25, "data.flip": False}
    return retrieval("ssv2", "ssv2_label", "val", changes)


def retrieval(name: str, dataset: str, eval_split: str, changes: Changes) -> ExperimentConfig:
    """Build the config of one data set.

    Args:
      name: the variant.
      dataset: the prepared data set; its split `train` is trained on.
      eval_split: the split of the same data set to evaluate on.
      changes: what differs between the data sets, by dotted field names.
    """
    return smaug(
        f"smaug_{name}_retrieval",
        SourceConfig(dataset, "train", num_frames=4),
        SourceConfig("", eval_split, num_frames=12),
        changes | {"evaluation.rerank_top_k": 128, "evaluation.rerank_by": "match"},
    )


VARIANTS = {
    "msrvtt": msrvtt,
    "msrvtt_mc": msrvtt_mc,
    "didemo": didemo,
    "activitynet": activitynet,
    "ssv2": ssv2,
}

if __name__ == "__main__":
    main(VARIANTS)
