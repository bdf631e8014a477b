"""The smallest experiment with every objective, for the tests of the running system.

Runnable like any experiment file: python tests/support/tiny_experiment.py --data.data-dir DIR
"""

from data_pipelines.schema.config import DataConfig, SourceConfig
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig, OptimConfig, TrainConfig
from vlmae.config.model import (
    FusionConfig,
    MaskConfig,
    ModelConfig,
    PixelDecoderConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)


def get_config() -> ExperimentConfig:
    """One layer each, 16 wide, on frames of 2 x 2 patches."""
    return ExperimentConfig(
        name="tiny",
        data=DataConfig(
            train=(SourceConfig("shapes", "train", num_frames=2),),
            eval=SourceConfig("", "test", num_frames=2),
            batch_size=8,
            eval_batch_size=8,
            image_size=16,
            text_len=16,
            num_workers=0,
        ),
        model=ModelConfig(
            video=VideoEncoderConfig(
                width=16, depth=1, num_heads=2, mlp_dim=32, patch_size=8, mask=MaskConfig(ratio=0.5)
            ),
            text=TextEncoderConfig(
                width=16, depth=1, num_heads=2, mlp_dim=32, max_len=16, dropout=0.1
            ),
            fusion=FusionConfig(depth=1),
            pixel_decoder=PixelDecoderConfig(width=16, depth=1, num_heads=2),
            embed_dim=8,
            dtype="float32",
        ),
        optim=OptimConfig(learning_rate=1e-3),
        train=TrainConfig(steps=8, log_every_steps=1, save_every_steps=4),
    )


def sweep_ratio():
    """The second one is no ratio, so its run fails."""
    for ratio in (0.25, 1.5, 0.5):
        yield {"model.video.mask.ratio": ratio}


def sweep_seed():
    """Two seeds."""
    yield from ({"seed": seed} for seed in (0, 1))


SWEEPS = (sweep_ratio, sweep_seed)

if __name__ == "__main__":
    main(get_config, sweeps=SWEEPS)
