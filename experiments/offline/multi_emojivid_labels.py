"""Multi-label classification on EmojiVid: the tags of a clip with its caption (MuLTI, downstream).

    vlmae prepare emojivid            # 800 MB of downloads, once
    python experiments/offline/multi_emojivid_pretrain.py
    python experiments/offline/multi_emojivid_labels.py --train.init-from runs/multi_emojivid_b

131 tags, of which a clip has none to a dozen; the text is the caption. Without `--train.init-from`
it trains from scratch. Protocol B: stills of the tested families are in training, with their tags.

Result (300 steps at 48 px after 400 of pre-training, three seeds): mean average precision of
14.2 ± 0.5 %, where chance is 2.1.
"""

from experiments.offline import multi_emojivid_pretrain
from experiments.recipes import EMOJIVID, NO_PRETRAINING
from experiments.sweeps import sweep_seed
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override


def get_config() -> ExperimentConfig:
    """Pre-training's data and model, with binary cross-entropy over all tags."""
    return override(
        multi_emojivid_pretrain.get_config(),
        {
            **EMOJIVID,
            **NO_PRETRAINING,
            "name": "multi_emojivid_labels",
            "data.task": "labels",
            "objectives.label": 1.0,
            "evaluation.choices": 0,
        },
    )


if __name__ == "__main__":
    main(get_config, (sweep_seed,))
