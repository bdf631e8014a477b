"""MuLTI on EmojiVid: a small model from scratch on the CPU; a sampler condenses text and clips.

    vlmae prepare emojivid            # 800 MB of downloads, once
    python experiments/offline/multi_emojivid_pretrain.py

Data and sizes are those of `smaug_emojivid_pretrain.py`; nothing is masked, and multiple choice
modeling takes the place of reconstruction. Sweeps compare the fusions, the pooling of the sampler
and training without multiple choice (`--sweep fusion,seed`).

Result: not yet run at this size; over several seeds at 48 px, 400 steps of 32, in docs/results.md.
"""

from experiments.offline import smaug_emojivid_pretrain
from experiments.sweeps import sweep_fusion, sweep_mcm, sweep_pooling, sweep_seed
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override


def get_config() -> ExperimentConfig:
    """Protocol B, unmasked, the multiway fusion and MCM."""
    return override(
        smaug_emojivid_pretrain.get_config(),
        {
            "name": "multi_emojivid_b",
            "model.video.mask.ratio": 0.0,
            "model.text.max_len": 64,
            "model.fusion.kind": "multiway",
            "model.fusion.sampler.video_latents": 16,
            "model.fusion.sampler.text_latents": 4,
            "objectives.mvm": 0.0,
            "objectives.mcm": 1.0,
            "objectives.mcm_kind": "score",  # concat stays at chance for as long as this trains
            "objectives.mcm_len": 64,
            "evaluation.choices": 4,
        },
    )


if __name__ == "__main__":
    main(get_config, (sweep_fusion, sweep_pooling, sweep_mcm, sweep_seed))
