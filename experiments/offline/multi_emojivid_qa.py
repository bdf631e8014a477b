"""Question answering on EmojiVid, by a classifier over answers (MuLTI, downstream).

    vlmae prepare emojivid            # 800 MB of downloads, once
    python experiments/offline/multi_emojivid_pretrain.py
    python experiments/offline/multi_emojivid_qa.py --train.init-from runs/multi_emojivid_b

Questions about clips of emoji families that no training clip shows: man, woman or person; what
kind of thing; what it is (protocol B: stills of those families are in training, with their
questions). Without `--train.init-from` it trains from scratch.

Result (2 CPU cores, jax 0.10.2, 48 px, 500 steps, three seeds): 15.0 ± 2.2 % from scratch, and
13.8 ± 2.1 from `multi_emojivid_pretrain.py` after 400 steps; the most frequent answers reach 9.6.
With adapters and by kind of question: see docs/results.md.
"""

from experiments.offline import multi_emojivid_pretrain
from experiments.recipes import EMOJIVID, QUESTIONS
from experiments.sweeps import sweep_seed
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override


def get_config() -> ExperimentConfig:
    """Pre-training's data and model, with questions in place of captions and one objective."""
    return override(
        multi_emojivid_pretrain.get_config(),
        {
            **EMOJIVID,
            **QUESTIONS,
            "name": "multi_emojivid_qa",
            "data.max_classes": 120,  # the names of single emoji have two to 18 stills each
            "objectives.answer": 1.0,
            "evaluation.choices": 0,
        },
    )


if __name__ == "__main__":
    main(get_config, (sweep_seed,))
