"""MuLTI's pre-training: ViT-B/16 and BERT-base, condensed and fused by the MultiWay-Sampler.

    python experiments/multi_pretrain.py

Data: WebVid-2M and CC3M, prepared as for `smaug_pretrain.py`. The recipe is that of the system
MuLTI builds on (ALPRO): AdamW at 1e-4 with betas (0.9, 0.98), 5 % warm-up, linear decay, 15 % of
the words masked. Number of latents, depth of the sampler, frames, batch size, epochs are ours.

Result: not yet run.
"""

from data_pipelines.config import DataConfig, SourceConfig
from experiments.smaug_pretrain import CC3M_IMAGES, WEBVID_CLIPS
from vlmae.cli import main
from vlmae.config import ExperimentConfig, ObjectivesConfig, OptimConfig, TrainConfig
from vlmae.model_config import (
    FusionConfig,
    MaskConfig,
    ModelConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)

BATCH_SIZE, EPOCHS = 256, 10
EPOCH_STEPS = (WEBVID_CLIPS + CC3M_IMAGES) // BATCH_SIZE


def get_config() -> ExperimentConfig:
    """B/16 unmasked, 12 text layers, 3 layers of sampler and fusion with one attention each."""
    return ExperimentConfig(
        name="multi_pretrain",
        data=DataConfig(
            train=(
                SourceConfig("webvid", "train", num_frames=4, weight=WEBVID_CLIPS),
                SourceConfig("cc3m", "train", num_frames=1, weight=CC3M_IMAGES),
            ),
            eval=SourceConfig("webvid", "val", num_frames=4),
            batch_size=BATCH_SIZE,
            eval_batch_size=64,
            image_size=224,
            text_len=40,
            num_workers=16,
        ),
        model=ModelConfig(
            video=VideoEncoderConfig(mask=MaskConfig("none", 0.0), time_frames=4),
            text=TextEncoderConfig(depth=12),
            fusion=FusionConfig("multiway", depth=3),
        ),
        objectives=ObjectivesConfig(mvm=0.0, mcm=1.0, mlm_ratio=0.15, mcm_len=160),
        optim=OptimConfig(
            learning_rate=1e-4,
            schedule="linear",
            warmup_steps=EPOCHS * EPOCH_STEPS // 20,
            final_ratio=0.0,
            b2=0.98,
            weight_decay=1e-3,
        ),
        train=TrainConfig(
            steps=EPOCHS * EPOCH_STEPS,
            log_every_steps=50,
            eval_every_steps=EPOCH_STEPS,
            save_every_steps=2000,
        ),
    )


if __name__ == "__main__":
    main(get_config)
