"""SMAUG finetuned for question answering, by a decoder that ranks answers.

    vlmae prepare msrvtt_qa --manual-dir DIR
    python experiments/smaug/qa.py msrvtt

A decoder of three layers learns to write the answer. Evaluation ranks all answers of the training
split: the probability of the first token selects 128, the probability of the whole answer ranks
them. Questions have 25 tokens, answers 5; 10 epochs with 5 % of warm-up (Singularity's setting).
Each variant names the data that it needs.

Results: not yet run.
"""

from data_pipelines.schema.config import SourceConfig
from experiments.recipes import DECODED_ANSWERS, schedule, smaug
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig


def msrvtt() -> ExperimentConfig:
    """MSR-VTT-QA: 158,581 training questions.

    vlmae prepare msrvtt_qa --manual-dir DIR
    """
    return question_answering("msrvtt_qa")


def activitynet() -> ExperimentConfig:
    """ActivityNet-QA: 32,000 training questions.

    vlmae prepare activitynet_qa --manual-dir DIR
    """
    return question_answering("activitynet_qa")


def question_answering(dataset: str) -> ExperimentConfig:
    """Build the config of one data set."""
    return smaug(
        f"smaug_{dataset}",
        SourceConfig(dataset, "train", num_frames=4),
        SourceConfig("", "test", num_frames=12),
        DECODED_ANSWERS | schedule(epochs=10, warmup=0.05),
    )


VARIANTS = {"msrvtt": msrvtt, "activitynet": activitynet}

if __name__ == "__main__":
    main(VARIANTS)
