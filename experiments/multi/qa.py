"""MuLTI finetuned for question answering: open-ended questions, or five options.

    vlmae prepare msrvtt_qa --manual-dir DIR
    python experiments/multi/qa.py msrvtt
    vlmae evaluate runs/multi_msrvtt_qa --split test

Open-ended questions are classification over the most frequent answers. Of five options, each is
scored together with the question, as in MCM, and a softmax compares the scores. All variants use
16 frames, 40 tokens, a learning rate of 5e-5 and 10 % of warm-up (ALPRO's setting). Training is
watched on `val`, and `test` is evaluated afterwards; TGIF-QA has no `val` and is evaluated at the
end alone. Each variant names its data.

Results: not yet run.
"""

from data_pipelines.schema.config import SourceConfig
from experiments.recipes import AT_THE_END, FIVE_OPTIONS, QUESTIONS, multi, schedule
from experiments.sweeps import Changes
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig

CLASSIFIED = QUESTIONS | {"objectives.answer": 1.0}
BATCH = 192  # ALPRO's: 12 a GPU on 8, gradients of two summed


UNMIRRORED = schedule(epochs=10, warmup=0.1, batch_size=64) | AT_THE_END | {"data.flip": False}


def msrvtt() -> ExperimentConfig:
    """MSR-VTT-QA: 10 epochs, 1,500 answers.

    They are the most frequent ones of training. `--data.classes train_ans2label.json` takes the
    1,500 of ALPRO instead, in their order.

    vlmae prepare msrvtt_qa --manual-dir DIR
    """
    epochs = schedule(epochs=10, warmup=0.1, batch_size=BATCH)
    changes = CLASSIFIED | epochs | {"data.max_classes": 1500}
    return question_answering("msrvtt_qa", "val", changes)


def msvd() -> ExperimentConfig:
    """MSVD-QA: 15 epochs (ALPRO's setting), all answers of the training split, at most 2,423.

    Training has 1,852 answers. ALPRO tells 2,423 apart, those of all splits: its list is taken by
    `--data.classes train_ans2label.json`. The result `answerable` compares the two.

    vlmae prepare msvd_qa --manual-dir DIR
    """
    changes = {"data.max_classes": 2423, "optim.clip_norm": 20.0}
    epochs = schedule(epochs=15, warmup=0.1, batch_size=BATCH)
    return question_answering("msvd_qa", "val", CLASSIFIED | epochs | changes)


def tgif_frame() -> ExperimentConfig:
    """TGIF-QA FrameQA: 10 epochs, all answers of the training split (ours).

    vlmae prepare tgif_frame --manual-dir DIR
    """
    epochs = schedule(epochs=10, warmup=0.1)
    return question_answering("tgif_frame", "test", CLASSIFIED | epochs | AT_THE_END)


def tgif_action() -> ExperimentConfig:
    """TGIF-QA Action: five options, 10 epochs (ours). No mirroring: answers name left and right.

    vlmae prepare tgif_action --manual-dir DIR
    """
    return question_answering("tgif_action", "test", FIVE_OPTIONS | UNMIRRORED)


def tgif_transition() -> ExperimentConfig:
    """TGIF-QA Transition: as `tgif_action`.

    vlmae prepare tgif_transition --manual-dir DIR
    """
    return question_answering("tgif_transition", "test", FIVE_OPTIONS | UNMIRRORED)


def question_answering(dataset: str, eval_split: str, changes: Changes) -> ExperimentConfig:
    """Build the config of one data set; `changes` holds the kind of answer and the schedule."""
    return multi(
        f"multi_{dataset}",
        SourceConfig(dataset, "train", num_frames=16),
        SourceConfig("", eval_split, num_frames=16),
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
