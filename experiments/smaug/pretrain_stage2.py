"""SMAUG's pre-training, stage 2: four frames of each clip, going on from stage 1.

    vlmae prepare webvid_2m --manual-dir WEBVID --max-bad-ratio 0.3
    python experiments/smaug/pretrain_stage2.py --train.init-from runs/smaug_pretrain

WebVid-2M only, AdamW at 5e-5, 5 epochs (as in the system SMAUG builds on, Singularity). This stage
adds what needs several frames: the frame selector, which keeps two of four, and temporal
embeddings, which start at zero.

Result: not yet run.
"""

import dataclasses

from data_pipelines.schema.config import SourceConfig
from experiments.smaug import pretrain as smaug_pretrain
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.model import FrameSelectorConfig

EPOCHS = 5.0


def get_config() -> ExperimentConfig:
    """Stage 1 with other data, a smaller batch and half the learning rate."""
    stage1 = smaug_pretrain.get_config()
    clips = SourceConfig("webvid_2m", "train", num_frames=4)
    model = dataclasses.replace(
        stage1.model,
        # Embeddings that start at zero leave the frames' features of stage 1 as they are.
        video=dataclasses.replace(stage1.model.video, time_frames=4),
        selector=FrameSelectorConfig("mlp", frames=2),
    )
    return dataclasses.replace(
        stage1,
        name="smaug_pretrain_stage2",
        model=model,
        data=dataclasses.replace(stage1.data, train=(clips,), batch_size=128),
        optim=dataclasses.replace(stage1.optim, learning_rate=5e-5, warmup_share=1 / EPOCHS),
        train=dataclasses.replace(stage1.train, epochs=EPOCHS, init_from="runs/smaug_pretrain"),
    )


if __name__ == "__main__":
    main(get_config)
