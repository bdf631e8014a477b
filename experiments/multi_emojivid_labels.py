"""Multi-label classification on EmojiVid: the tags of a clip with its caption (MuLTI, downstream).

    python -m data_pipelines.prepare emojivid            # 800 MB of downloads, once
    python experiments/multi_emojivid_pretrain.py
    python experiments/multi_emojivid_labels.py --train.init-from runs/multi_emojivid_b

131 tags, of which a clip has none to a dozen; the text is the caption. Without `--train.init-from`
it trains from scratch. Protocol B: stills of the tested families are in training, with their tags.

Result (300 steps at 48 px after 400 of pre-training, three seeds): mean average precision of
14.2 ± 0.5 %, where chance is 2.1.
"""

from experiments import multi_emojivid_pretrain
from experiments._finetune import EMOJIVID
from experiments._sweeps import sweep_seed
from vlmae.cli import main
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override


def get_config() -> ExperimentConfig:
    """The pre-training's data and model; binary cross-entropy of every tag."""
    return override(
        multi_emojivid_pretrain.get_config(),
        {
            **EMOJIVID,
            "name": "multi_emojivid_labels",
            "data.task": "labels",
            "objectives.vtc": 0.0,
            "objectives.vtm": 0.0,
            "objectives.mlm": 0.0,
            "objectives.mcm": 0.0,
            "objectives.label": 1.0,
            "evaluation.choices": 0,
        },
    )


if __name__ == "__main__":
    main(get_config, (sweep_seed,))
