"""MuLTI finetuned for question answering: open-ended questions, or five options.

    vlmae prepare msrvtt_qa --manual-dir DIR
    python experiments/multi/qa.py msrvtt

Open-ended questions are classification over the most frequent answers. Of five options, each is
scored together with the question, as in MCM, and a softmax compares the scores. All variants use
16 frames, 40 tokens, a learning rate of 5e-5 and 5 % of warm-up (ALPRO's setting). Each variant
names the data that it needs.

Results: not yet run.
"""

from data_pipelines.schema.config import SourceConfig
from experiments.recipes import FIVE_OPTIONS, QUESTIONS, multi, schedule
from experiments.sweeps import Changes
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig

CLASSIFIED = QUESTIONS | {"objectives.answer": 1.0}


def msrvtt() -> ExperimentConfig:
    """MSR-VTT-QA: 10 epochs, 1,500 answers.

    They are the most frequent ones of training. `--data.classes train_ans2label.json` takes the
    1,500 of ALPRO instead, in their order.

    vlmae prepare msrvtt_qa --manual-dir DIR
    """
    epochs = schedule(epochs=10, warmup=0.05)
    return question_answering("msrvtt_qa", CLASSIFIED | epochs | {"data.max_classes": 1500})


def msvd() -> ExperimentConfig:
    """MSVD-QA: 15 epochs (ALPRO's setting), all answers of the training split, at most 2,423.

    Training has 1,852 answers. ALPRO tells 2,423 apart, those of all splits: its list is taken by
    `--data.classes train_ans2label.json`. The result `answerable` compares the two.

    vlmae prepare msvd_qa --manual-dir DIR
    """
    changes = {"data.max_classes": 2423, "optim.clip_norm": 20.0}
    epochs = schedule(epochs=15, warmup=0.05)
    return question_answering("msvd_qa", CLASSIFIED | epochs | changes)


def tgif_frame() -> ExperimentConfig:
    """TGIF-QA FrameQA: 10 epochs, all answers of the training split (ours).

    vlmae prepare tgif_frame --manual-dir DIR
    """
    epochs = schedule(epochs=10, warmup=0.05)
    return question_answering("tgif_frame", CLASSIFIED | epochs)


def tgif_action() -> ExperimentConfig:
    """TGIF-QA Action: five options, 10 epochs (ours). No mirroring: answers name left and right.

    vlmae prepare tgif_action --manual-dir DIR
    """
    epochs = schedule(epochs=10, warmup=0.05, batch_size=64)
    return question_answering("tgif_action", FIVE_OPTIONS | epochs | {"data.flip": False})


def tgif_transition() -> ExperimentConfig:
    """TGIF-QA Transition: as `tgif_action`.

    vlmae prepare tgif_transition --manual-dir DIR
    """
    epochs = schedule(epochs=10, warmup=0.05, batch_size=64)
    return question_answering("tgif_transition", FIVE_OPTIONS | epochs | {"data.flip": False})


def question_answering(dataset: str, changes: Changes) -> ExperimentConfig:
    """Build the config of one data set; `changes` holds the kind of answer and the schedule."""
    return multi(
        f"multi_{dataset}",
        SourceConfig(dataset, "train", num_frames=16),
        SourceConfig("", "test", num_frames=16),
        changes | {"data.text_len": 40, "optim.learning_rate": 5e-5},
    )


VARIANTS = {
    "msrvtt": msrvtt,
    "msvd": msvd,
    "tgif_frame": tgif_frame,
    "tgif_action": tgif_action,
    "tgif_transition": tgif_transition,
}

if __name__ == "__main__":
    main(VARIANTS)
