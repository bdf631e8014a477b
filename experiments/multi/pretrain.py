"""MuLTI's pre-training: ViT-B/16 and BERT-base, condensed and fused by the MultiWay-Sampler.

    vlmae prepare webvid_2m --manual-dir WEBVID --max-bad-ratio 0.3 --short-side 224 --fps 2
    vlmae prepare cc3m --manual-dir CC3M --max-bad-ratio 0.3 --short-side 224
    python experiments/multi/pretrain.py          # from random weights
    python experiments/multi/pretrain.py alpro    # from ViT-B/16 and BERT-base

Data: WebVid-2M and CC3M, prepared as in `experiments/smaug/pretrain.py` (ours). The recipe is that
of the system MuLTI builds on (ALPRO, config_release/pretrain_alpro.json): four frames of each clip,
texts of 30 tokens, batches of 256 (16 a GPU on 16), AdamW at 1e-4 with betas (0.9, 0.98), 5 %
warm-up, linear decay, gradients clipped at 20, 10 epochs, 15 % of the words masked. Number of
latents, depth of the sampler and random weights are ours; docs/guide/recipes.md has the source of
each figure.

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
    VitLayout,
)
from vlmae.config.tree import override

VIT = "google/vit-base-patch16-224"  # ALPRO takes the same weights in timm's layout
# What `vlmae weights` prints for it.
VIT_BASE = {
    "model.video.positions": "learned",
    "model.video.layout": VitLayout(
        eps=1e-12, pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5)
    ),
}


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
            text_len=30,
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
            clip_norm=20.0,
        ),
        train=smaug.train,  # as many epochs
    )


def alpro() -> ExperimentConfig:
    """From ViT-B/16 and BERT-base: the papers' encoders, and ALPRO's initial weights.

    Sampler and fusion begin with random weights. ALPRO also learns from entity prompts, which MuLTI
    replaces by multiple choice.
    """
    changes = {
        "name": "multi_pretrain_alpro",
        "train.init.video": VIT,
        "train.init.text": smaug_pretrain.BERT,
    }
    return override(get_config(), VIT_BASE | changes)


VARIANTS = {"": get_config, "alpro": alpro}

if __name__ == "__main__":
    main(VARIANTS)
