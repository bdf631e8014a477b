"""Retrieval on EmojiVid, finetuned by VTC and VTM without masks (SMAUG, downstream).

    vlmae prepare emojivid            # 800 MB of downloads, once
    python experiments/offline/smaug_emojivid_pretrain.py
    python experiments/offline/smaug_emojivid_retrieval.py --train.init-from runs/emojivid_b

Text to video among 220 clips of emoji families that no training clip shows, ranked by VTC. Scoring
the best 32 again by VTM (`--evaluation.rerank-top-k 32`) loses here: R@10 on val falls from 89.0 to
71.2 (one run of 500 steps). Without `--train.init-from` it trains from scratch. Protocol A:
`--data.train.1.split stills_a`.

Result (300 steps at 48 px, three seeds, mean): R@1 / 5 / 10 of 15.8 / 46.7 / 64.2, from scratch
1.5 / 12.4 / 20.6; protocol A 4.4 / 17.0 / 26.2 and 1.1 / 6.4 / 14.4;
chance is 0.5 / 2.3 / 4.5.
"""

from experiments.offline import smaug_emojivid_pretrain
from experiments.recipes import EMOJIVID
from experiments.sweeps import sweep_seed
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override


def get_config() -> ExperimentConfig:
    """Pre-training's data and model, without masks."""
    return override(
        smaug_emojivid_pretrain.get_config(),
        {
            **EMOJIVID,
            "name": "smaug_emojivid_retrieval",
            "model.video.mask.ratio": 0.0,
            "objectives.mlm": 0.0,
            "objectives.mvm": 0.0,
        },
    )


if __name__ == "__main__":
    main(get_config, (sweep_seed,))
