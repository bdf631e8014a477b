"""Question answering on EmojiVid, by a classifier over answers (MuLTI, downstream).

    python -m data_pipelines.prepare emojivid            # 800 MB of downloads, once
    python experiments/multi_emojivid_pretrain.py
    python experiments/multi_emojivid_qa.py --train.init-from runs/multi_emojivid_b

Questions about clips of emoji families that no training clip shows: man, woman or person; what
kind of thing; what it is (protocol B: stills of those families are in training, with their
questions). Without `--train.init-from` it trains from scratch.

Result (2 CPU cores, jax 0.10.2, 48 px, 500 steps, three seeds): 15.0 ± 2.2 % from scratch, and
13.8 ± 2.1 from `multi_emojivid_pretrain.py` after 400 steps; the most frequent answers reach 9.6.
With adapters and by kind of question: see the README.
"""

from experiments import multi_emojivid_pretrain
from experiments._finetune import EMOJIVID
from experiments._sweeps import sweep_seed
from vlmae.cli import main
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override


def get_config() -> ExperimentConfig:
    """The pre-training's data and model; questions in place of captions, one objective."""
    return override(
        multi_emojivid_pretrain.get_config(),
        {
            **EMOJIVID,
            "name": "multi_emojivid_qa",
            "data.task": "questions",
            "data.max_classes": 120,  # the names of single emoji have two to 18 stills each
            "objectives.vtc": 0.0,
            "objectives.vtm": 0.0,
            "objectives.mlm": 0.0,
            "objectives.mcm": 0.0,
            "objectives.answer": 1.0,
            "evaluation.choices": 0,
        },
    )


if __name__ == "__main__":
    main(get_config, (sweep_seed,))
