"""Question answering on EmojiVid, by a decoder that ranks answers (SMAUG, downstream).

    vlmae prepare emojivid            # 800 MB of downloads, once
    python experiments/offline/smaug_emojivid_pretrain.py
    python experiments/offline/smaug_emojivid_qa.py --train.init-from runs/emojivid_b

Questions about clips of emoji families that no training clip shows: man, woman or person; what
kind of thing; what it is (protocol B). Without `--train.init-from` it trains from scratch.

Result (600 steps at 48 px, three seeds): 15.6 ± 0.1 % of 508 questions, from scratch 12.6 (one
seed); the most frequent answers reach 9.6.
"""

from experiments.offline import smaug_emojivid_pretrain
from experiments.recipes import EMOJIVID, QUESTIONS
from experiments.sweeps import sweep_seed
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override


def get_config() -> ExperimentConfig:
    """Pre-training's data and model, without masks, with an answer decoder of two layers."""
    return override(
        smaug_emojivid_pretrain.get_config(),
        {
            **EMOJIVID,
            **QUESTIONS,
            "name": "smaug_emojivid_qa",
            "data.max_classes": 120,  # the names of single emoji have two to 18 stills each
            "data.answer_len": 10,
            "model.video.mask.ratio": 0.0,
            "model.answer_depth": 2,
            "objectives.answer": 1.0,
            "objectives.answer_kind": "decoder",
        },
    )


if __name__ == "__main__":
    main(get_config, (sweep_seed,))
