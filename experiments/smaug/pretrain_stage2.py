"""SMAUG's pre-training, stage 2: four frames of each clip, going on from stage 1.

    vlmae prepare webvid_2m --manual-dir WEBVID --max-bad-ratio 0.3 --short-side 224 --fps 2
    python experiments/smaug/pretrain_stage2.py --train.init-from runs/smaug_pretrain
    python experiments/smaug/pretrain_stage2.py singularity    # after that variant of stage 1

WebVid-2M only, AdamW at 5e-5, 5 epochs, two temporal layers (as in the system SMAUG builds on,
Singularity, whose README has the command). This stage adds what needs several frames: temporal
embeddings, which start at zero, the temporal layers, and the frame selector, which keeps two of
four (ours). The batch without a variant is ours.

Result: not yet run.
"""

import dataclasses

from data_pipelines.schema.config import SourceConfig
from experiments.smaug import pretrain as smaug_pretrain
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.model import FrameSelectorConfig
from vlmae.config.tree import override

EPOCHS = 5.0


def get_config() -> ExperimentConfig:
    """Stage 1 with other data, a smaller batch and half the learning rate."""
    stage1 = smaug_pretrain.get_config()
    clips = SourceConfig("webvid_2m", "train", num_frames=4)
    model = dataclasses.replace(
        stage1.model,
        video=dataclasses.replace(stage1.model.video, time_frames=4, time_depth=2),
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


def singularity() -> ExperimentConfig:
    """After stage 1 from BEiT-base and BERT-base, batches of 96: 32 a GPU on 3 (Singularity)."""
    changes = {
        "name": "smaug_pretrain_stage2_singularity",
        "data.batch_size": 96,
        "train.init_from": "runs/smaug_pretrain_singularity",
    }
    return override(get_config(), smaug_pretrain.BEIT_BASE | changes)


VARIANTS = {"": get_config, "singularity": singularity}

if __name__ == "__main__":
    main(VARIANTS)
