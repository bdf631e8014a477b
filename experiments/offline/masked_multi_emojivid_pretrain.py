"""Both papers at once: SMAUG's masked, pruned encoder feeds MuLTI's sampler (ours).

    vlmae prepare emojivid            # 800 MB of downloads, once
    python experiments/offline/masked_multi_emojivid_pretrain.py

The encoder sees 35 % of the patches and prunes their tokens in three stages, the sampler condenses
the rest, and all five objectives train the model. It combines `smaug_emojivid_pretrain.py` and
`multi_emojivid_pretrain.py`; `--sweep parents,seed` runs all three as one sweep.

Result: not yet run at this size; over several seeds at 48 px, 400 steps of 32, in docs/results.md.
"""

from collections.abc import Iterator

from experiments.offline import multi_emojivid_pretrain
from experiments.sweeps import Changes, sweep_seed
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override


def get_config() -> ExperimentConfig:
    """MuLTI's config with 65 % of the patches masked, three stages of token pruning, and MVM."""
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
    """Compare SMAUG alone, MuLTI alone, and both."""
    yield {"model.fusion.kind": "cross_attention", "objectives.mcm": 0.0}
    yield {
        "model.video.mask.ratio": 0.0,
        "model.video.sparsify.keep_rate": 1.0,
        "objectives.mvm": 0.0,
    }
    yield {"model.fusion.kind": "multiway"}


if __name__ == "__main__":
    main(get_config, (sweep_parents, sweep_seed))
