"""MuLTI's pre-training: ViT-B/16 and BERT-base, condensed and fused by the MultiWay-Sampler.

    vlmae prepare webvid_2m --manual-dir WEBVID --max-bad-ratio 0.3
    vlmae prepare cc3m --manual-dir CC3M --max-bad-ratio 0.3
    python experiments/multi/pretrain.py

Data: WebVid-2M and CC3M, prepared and read as in `experiments/smaug/pretrain.py`, but four frames
of each clip and longer texts. The recipe is that of the system MuLTI builds on (ALPRO): AdamW at
1e-4 with betas (0.9, 0.98), 5 % warm-up, linear decay, 15 % of the words masked. Number of latents,
depth of the sampler, frames, batch size, epochs are ours.

Result: not yet run.
"""

from dataclasses import replace

from experiments.smaug import pretrain as smaug_pretrain
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig, ObjectivesConfig, OptimConfig
from vlmae.config.model import (
    FusionConfig,
    MaskConfig,
    ModelConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)


def get_config() -> ExperimentConfig:
    """B/16 unmasked, 12 text layers, 3 layers of sampler and fusion with one attention each."""
    smaug = smaug_pretrain.get_config()
    clips, images = smaug.data.train
    return ExperimentConfig(
        name="multi_pretrain",
        data=replace(
            smaug.data,
            train=(replace(clips, num_frames=4), images),
            batch_size=256,
            text_len=40,
        ),
        model=ModelConfig(
            # MuLTI sees whole frames: its sampler is what makes long clips cheap.
            video=VideoEncoderConfig(mask=MaskConfig("none", 0.0), time_frames=4),
            text=TextEncoderConfig(depth=12),
            fusion=FusionConfig("multiway", depth=3),
        ),
        objectives=ObjectivesConfig(mvm=0.0, mcm=1.0, mlm_ratio=0.15, mcm_len=160),
        optim=OptimConfig(
            learning_rate=1e-4,
            schedule="linear",
            warmup_share=0.05,
            final_ratio=0.0,
            b2=0.98,
            weight_decay=1e-3,
        ),
        train=smaug.train,  # as many epochs
    )


if __name__ == "__main__":
    main(get_config)
