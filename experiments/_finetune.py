"""What the finetuning files share: how a pre-trained model goes on downstream."""

from data_pipelines.config import SourceConfig
from experiments import multi_pretrain, smaug_pretrain_stage2
from experiments._sweeps import Changes
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override


def smaug(
    name: str, train: SourceConfig, evaluation: SourceConfig, changes: Changes
) -> ExperimentConfig:
    """SMAUG's model after stage 2 of its pre-training: no masks, no decoder of pixels, no MLM.

    The recipe is that of the system it builds on (Singularity): AdamW at 1e-5, cosine to 10 %,
    weight decay 0.02, batches of 32 a GPU (128 here: four of them). Thinning and choosing frames
    are off and can be switched on (`--model.video.sparsify.keep-rate 0.7`,
    `--model.selector.kind mlp`).

    Args:
      name: of the experiment.
      train: what to train on.
      evaluation: what to evaluate on.
      changes: further fields, by their dotted names.
    """
    base = override(
        smaug_pretrain_stage2.get_config(),
        {
            "data.batch_size": 128,
            "model.video.mask.ratio": 0.0,
            "model.video.sparsify.keep_rate": 1.0,
            "model.selector.kind": "none",
            "objectives.mlm": 0.0,
            "objectives.mvm": 0.0,
            "optim.learning_rate": 1e-5,
            "optim.final_ratio": 0.1,
            "optim.warmup_steps": 0,
            "train.init_from": "runs/smaug_pretrain_stage2",
        },
    )
    return _downstream(base, name, train, evaluation, changes)


def multi(
    name: str, train: SourceConfig, evaluation: SourceConfig, changes: Changes
) -> ExperimentConfig:
    """MuLTI's model after its pre-training: no MLM, and MCM only where a task is asked like it.

    The recipe is that of the system it builds on (ALPRO): AdamW with betas (0.9, 0.98), weight
    decay 1e-3, linear decay after 5 % of warm-up, gradients clipped. Batch sizes are ours.

    Args: as `smaug`.
    """
    base = override(
        multi_pretrain.get_config(),
        {
            "data.batch_size": 128,
            "objectives.mlm": 0.0,
            "objectives.mcm": 0.0,
            "optim.clip_norm": 5.0,
            "train.init_from": "runs/multi_pretrain",
        },
    )
    return _downstream(base, name, train, evaluation, changes)


# On EmojiVid: a short training of a small model.
EMOJIVID: Changes = {
    "data.batch_size": 32,
    "optim.learning_rate": 5e-4,
    "optim.warmup_steps": 50,
    "train.steps": 500,
    "train.eval_every_steps": 0,
    "train.save_every_steps": 500,
}
QUESTIONS: Changes = {"data.task": "questions", "objectives.vtc": 0.0, "objectives.vtm": 0.0}
# Singularity's lengths of questions and answers.
DECODED_ANSWERS = QUESTIONS | {
    "data.text_len": 25,
    "data.answer_len": 5,
    "objectives.answer": 1.0,
    "objectives.answer_kind": "decoder",
}
# Multiple choice: every option is scored alone, as MCM does it.
FIVE_OPTIONS = QUESTIONS | {
    "data.task": "options",
    "data.num_others": 4,
    "objectives.mcm": 1.0,
    "objectives.mcm_kind": "score",
    "objectives.mcm_template": "{} {} {} {} {}",
    "evaluation.choices": 5,
}


def schedule(examples: int, epochs: int, warmup: float = 0.0, batch_size: int = 128) -> Changes:
    """The fields for so many epochs, with a part of all steps as warm-up; evaluated every epoch."""
    epoch_steps = examples // batch_size
    steps = epochs * epoch_steps
    return {
        "data.batch_size": batch_size,
        "optim.warmup_steps": int(warmup * steps),
        "train.steps": steps,
        "train.eval_every_steps": epoch_steps,
        "train.save_every_steps": epoch_steps,
    }


def _downstream(
    base: ExperimentConfig,
    name: str,
    train: SourceConfig,
    evaluation: SourceConfig,
    changes: Changes,
) -> ExperimentConfig:
    fields = {"name": name, "data.train": (train,), "data.eval": evaluation}
    return override(base, fields | changes)
