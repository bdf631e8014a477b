"""Both papers at once: SMAUG's masked, thinned encoder feeds MuLTI's sampler (ours).

    python -m data_pipelines.prepare emojivid            # 800 MB of downloads, once
    python experiments/masked_multi_emojivid_pretrain.py

The encoder sees 35 % of the patches and thins them as it goes, the sampler condenses what is left,
and all five objectives train it. Its parents are `smaug_emojivid_pretrain.py` and
`multi_emojivid_pretrain.py`; `--sweep parents,seed` runs the three under one roof.

Result: not yet run at this size; over several seeds at 48 px, 400 steps of 32, in the README.
"""

from collections.abc import Iterator

from experiments import multi_emojivid_pretrain
from experiments._sweeps import Changes, sweep_seed
from vlmae.cli import main
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override


def get_config() -> ExperimentConfig:
    """MuLTI's file with 65 % of the patches masked, three stages of thinning, and MVM."""
    return override(
        multi_emojivid_pretrain.get_config(),
        {
            "name": "masked_multi_emojivid_b",
            "model.video.mask.ratio": 0.65,
            "model.video.sparsify.keep_rate": 0.7,
            "model.pixel_decoder.target_ratio": 0.5,
            "objectives.mvm": 1.0,
        },
    )


def sweep_parents() -> Iterator[Changes]:
    """SMAUG alone, MuLTI alone, and both."""
    yield {"model.fusion.kind": "cross_attention", "objectives.mcm": 0.0}
    yield {
        "model.video.mask.ratio": 0.0,
        "model.video.sparsify.keep_rate": 1.0,
        "objectives.mvm": 0.0,
    }
    yield {"model.fusion.kind": "multiway"}


if __name__ == "__main__":
    main(get_config, (sweep_parents, sweep_seed))
