"""SMAUG's pre-training, stage 1: one frame of each clip, and images; ViT-B/16 and BERT-base.

    vlmae prepare webvid_2m --manual-dir WEBVID --max-bad-ratio 0.3 --short-side 224 --fps 2
    vlmae prepare cc3m --manual-dir CC3M --max-bad-ratio 0.3 --short-side 224
    python experiments/smaug/pretrain.py                # from random weights
    python experiments/smaug/pretrain.py singularity    # from BEiT-base and BERT-base

Data: WebVid-2M and CC3M, from one's own copies, which lack what can no longer be fetched; encoded
again as in Singularity, at 2 frames per second and 224 pixels. The recipe is that of the system
SMAUG builds on (Singularity, configs/pretrain.yaml): batches of clips and of images alternate,
AdamW at 1e-4, one epoch of warm-up, cosine to 1 %, 10 epochs. Masking ratio, keep rate and decoder
are ours, and so are random weights and the batch without a variant. Stage 2 is
`experiments/smaug/pretrain_stage2.py`; docs/guide/recipes.md has the source of each figure.

Result: not yet run.
"""

from data_pipelines.schema.config import DataConfig, SourceConfig
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig, OptimConfig, TrainConfig
from vlmae.config.model import (
    ModelConfig,
    PixelDecoderConfig,
    SparsifyConfig,
    VideoEncoderConfig,
    VitLayout,
)
from vlmae.config.tree import override

WEBVID_CLIPS, CC3M_IMAGES = 2_490_000, 2_950_000  # about: links die
EPOCHS = 10.0
BERT = "bert-base-uncased"
BEIT = "microsoft/beit-base-patch16-224-pt22k-ft22k"
# What `vlmae weights` prints for it.
BEIT_BASE = {
    "model.video.positions": "none",
    "model.video.layout": VitLayout(
        eps=1e-12,
        layer_scale=0.1,
        frame_cls="mean",
        relative_bias="layer",
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
    ),
}


def get_config() -> ExperimentConfig:
    """B/16 in bfloat16: 65 % of patches and half of the words masked, 30 % pruned a stage."""
    return ExperimentConfig(
        name="smaug_pretrain",
        data=DataConfig(
            train=(
                SourceConfig("webvid_2m", "train", num_frames=1, weight=WEBVID_CLIPS),
                SourceConfig("cc3m", "train", num_frames=1, weight=CC3M_IMAGES),
            ),
            eval=SourceConfig("", "val", num_frames=4),
            batch_size=512,
            eval_batch_size=64,
            image_size=224,
            text_len=32,
            flip=True,
            num_workers=16,
        ),
        model=ModelConfig(  # the defaults are B/16, BERT-base split 9 + 3, decoder 4 x 384
            video=VideoEncoderConfig(sparsify=SparsifyConfig(keep_rate=0.7)),
            pixel_decoder=PixelDecoderConfig(target_ratio=0.5),
        ),
        optim=OptimConfig(
            learning_rate=1e-4,
            warmup_share=1 / EPOCHS,
            final_ratio=0.01,
            weight_decay=0.02,
        ),
        train=TrainConfig(
            epochs=EPOCHS,
            log_every_steps=50,
            eval_every_epochs=1.0,
            save_every_steps=2000,
        ),
    )


def singularity() -> ExperimentConfig:
    """From BEiT-base and BERT-base, batches of 288: 96 clips a GPU on 3 (Singularity's README).

    Images are 128 a GPU there. The upper three layers of BERT go to the fusion.
    """
    changes = {
        "name": "smaug_pretrain_singularity",
        "data.batch_size": 288,
        "train.init.video": BEIT,
        "train.init.text": BERT,
    }
    return override(get_config(), BEIT_BASE | changes)


VARIANTS = {"": get_config, "singularity": singularity}

if __name__ == "__main__":
    main(VARIANTS)
