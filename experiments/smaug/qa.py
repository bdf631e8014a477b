"""SMAUG finetuned for question answering, by a decoder that ranks answers.

    vlmae prepare msrvtt_qa --manual-dir DIR --short-side 224 --fps 2
    python experiments/smaug/qa.py msrvtt
    vlmae evaluate runs/smaug_msrvtt_qa --split test

A decoder of three layers learns to write the answer. Evaluation ranks all answers of the training
split: the probability of the first token selects 128, the probability of the whole answer ranks
them. Questions have 25 tokens, answers 5; 10 epochs with 5 % of warm-up (Singularity's setting).
Training is watched on `val`, and `test` is evaluated afterwards. Each variant names its data.

Results: not yet run.
"""

from data_pipelines.schema.config import SourceConfig
from experiments.recipes import DECODED_ANSWERS, schedule, smaug
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig


def msrvtt() -> ExperimentConfig:
    """MSR-VTT-QA: 158,581 training questions.

    vlmae prepare msrvtt_qa --manual-dir DIR --short-side 224 --fps 2
    """
    return question_answering("msrvtt_qa")


def activitynet() -> ExperimentConfig:
    """ActivityNet-QA: 32,000 training questions.

    vlmae prepare activitynet_qa --manual-dir DIR --short-side 360 --fps 2
    """
    return question_answering("activitynet_qa")


def question_answering(dataset: str) -> ExperimentConfig:
    """Build the config of one data set."""
    return smaug(
        f"smaug_{dataset}",
        SourceConfig(dataset, "train", num_frames=4),
        SourceConfig("", "val", num_frames=12),
        DECODED_ANSWERS | schedule(epochs=10, warmup=0.05),
    )


VARIANTS = {"msrvtt": msrvtt, "activitynet": activitynet}

if __name__ == "__main__":
    main(VARIANTS)
