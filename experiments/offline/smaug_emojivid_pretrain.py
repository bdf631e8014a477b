"""SMAUG on EmojiVid: real clips, stills and captions, a small model from scratch on the CPU.

    vlmae prepare emojivid            # 800 MB of downloads, once
    python experiments/offline/smaug_emojivid_pretrain.py # protocol B
    python experiments/offline/smaug_emojivid_pretrain.py --data.train.1.split stills_a  # A

Evaluation retrieves clips of emoji families that no training clip shows. Protocol A (strict):
stills of those families are not seen either. Protocol B (image-covered): stills of all families
are seen, in two other art styles. The two are never compared with one another.

It is animation, not natural video: the figures are not comparable with the papers' data sets.

Result (one CPU core, jax 0.10.2, one seed, 20 min): protocol B, text to video R@1 / 5 / 10 of
17.3 / 44.5 / 62.3 among 220 clips, where chance is 0.5 / 2.3 / 4.5. Protocol A: 5.0 / 17.7 / 27.3.
docs/results.md shows what the parts of SMAUG save and cost here, over three seeds.
"""

from data_pipelines.schema.config import DataConfig, SourceConfig
from experiments.sweeps import SWEEPS
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig, OptimConfig, TrainConfig
from vlmae.config.model import (
    FusionConfig,
    ModelConfig,
    PixelDecoderConfig,
    SparsifyConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)


def get_config() -> ExperimentConfig:
    """Protocol B; clips and stills alternate, four batches of stills for one of clips."""
    return ExperimentConfig(
        name="emojivid_b",
        data=DataConfig(
            train=(
                SourceConfig("emojivid", "train", num_frames=4, weight=1.0),
                SourceConfig("emojivid", "stills_b", num_frames=1, weight=4.0),
            ),
            eval=SourceConfig("", "test", num_frames=4),
            batch_size=64,
            eval_batch_size=32,
            image_size=64,
            text_len=16,
            min_crop_scale=0.6,
            flip=False,  # some captions name left and right
            num_workers=1,
        ),
        model=ModelConfig(
            video=VideoEncoderConfig(
                width=96,
                depth=4,
                num_heads=3,
                mlp_dim=384,
                patch_size=8,
                sparsify=SparsifyConfig(stages=(1, 2, 3)),  # for sweeps; its keep rate of 1 is off
            ),
            text=TextEncoderConfig(
                width=96, depth=2, num_heads=3, mlp_dim=384, max_len=32, dropout=0.1
            ),
            fusion=FusionConfig(depth=1),
            pixel_decoder=PixelDecoderConfig(width=64, depth=1, num_heads=2),
            embed_dim=128,
            dtype="float32",
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.05, clip_norm=1.0),
        train=TrainConfig(
            steps=1000, log_every_steps=100, eval_every_steps=250, save_every_steps=250
        ),
    )


if __name__ == "__main__":
    main(get_config, SWEEPS)
