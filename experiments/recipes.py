"""Recipes of finetuning, shared by the experiment files."""

from data_pipelines.schema.config import SourceConfig
from experiments.multi import pretrain as multi_pretrain
from experiments.smaug import pretrain_stage2 as smaug_pretrain_stage2
from experiments.sweeps import Changes
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override


def smaug(
    name: str, train: SourceConfig, evaluation: SourceConfig, changes: Changes
) -> ExperimentConfig:
    """Finetune SMAUG after stage 2 of its pre-training, without masks, MVM and MLM.

    The recipe is that of the system it builds on (Singularity): AdamW at 1e-5, cosine to 10 %,
    weight decay 0.02, batches of 32 a GPU (128 here: four GPUs). Token pruning and frame selection
    are off; `--model.video.sparsify.keep-rate 0.7` and `--model.selector.kind mlp` switch them on.

    Args:
      name: name of the experiment.
      train: training data.
      evaluation: evaluation data.
      changes: values of further fields, by dotted names.
    """
    return override(
        smaug_pretrain_stage2.get_config(),
        {
            "name": name,
            "data.train": (train,),
            "data.eval": evaluation,
            "data.batch_size": 128,
            "model.video.mask.ratio": 0.0,
            "model.video.sparsify.keep_rate": 1.0,
            "model.selector.kind": "none",
            "objectives.mlm": 0.0,
            "objectives.mvm": 0.0,
            "optim.learning_rate": 1e-5,
            "optim.final_ratio": 0.1,
            "optim.warmup_share": 0.0,  # the schedule of a data set sets it
            "train.init_from": "runs/smaug_pretrain_stage2",
            **changes,
        },
    )


def multi(
    name: str, train: SourceConfig, evaluation: SourceConfig, changes: Changes
) -> ExperimentConfig:
    """Finetune MuLTI after its pre-training, without MLM; MCM only for multiple choice.

    The recipe is that of the system it builds on (ALPRO): AdamW with betas (0.9, 0.98), weight
    decay 1e-3, linear decay after 10 % of warm-up, gradients clipped. A batch of 128 is ours. The
    arguments are those of `smaug`.
    """
    return override(
        multi_pretrain.get_config(),
        {
            "name": name,
            "data.train": (train,),
            "data.eval": evaluation,
            "data.batch_size": 128,
            "objectives.mlm": 0.0,
            "objectives.mcm": 0.0,
            "optim.clip_norm": 5.0,
            "train.init_from": "runs/multi_pretrain",
            **changes,
        },
    )


# Short training of a small model on EmojiVid.
EMOJIVID: Changes = {
    "data.batch_size": 32,
    "optim.learning_rate": 5e-4,
    "optim.warmup_steps": 50,
    "train.steps": 500,
    "train.eval_every_steps": 0,
    "train.save_every_steps": 500,
}
# Objectives of pre-training, all off.
NO_PRETRAINING: Changes = {
    f"objectives.{name}": 0.0 for name in ("vtc", "vtm", "mlm", "mvm", "mcm")
}
QUESTIONS = NO_PRETRAINING | {"data.task": "questions"}
# Singularity's lengths of questions and answers.
DECODED_ANSWERS = QUESTIONS | {
    "data.text_len": 25,
    "data.answer_len": 5,
    "objectives.answer": 1.0,
    "objectives.answer_kind": "decoder",
}
# Multiple choice: each option is scored alone, as in MCM of kind "score".
FIVE_OPTIONS = QUESTIONS | {
    "data.task": "options",
    "data.num_others": 4,
    "objectives.mcm": 1.0,
    "objectives.mcm_kind": "score",
    "objectives.mcm_template": "{} {} {} {} {}",
    "evaluation.choices": 5,
}


# The split that results are reported on is all that is held out: not looked at while training.
AT_THE_END: Changes = {"train.eval_every_epochs": 0.0}


def schedule(epochs: int, warmup: float = 0.0, batch_size: int = 128) -> Changes:
    """Set a number of epochs; evaluate and save after every epoch.

    Args:
      epochs: number of epochs: passes over the captions, questions or labeled clips.
      warmup: warm-up, as a share of all steps.
      batch_size: clips in a step.
    """
    return {
        "data.batch_size": batch_size,
        "optim.warmup_share": warmup,
        "train.epochs": float(epochs),
        "train.eval_every_epochs": 1.0,
        "train.save_every_epochs": 1.0,
    }
