"""One encoder for pictures or clips, one for texts, compared by VTC alone (CLIP, SigLIP).

    vlmae prepare manifest --name mine --split train=train.csv --split test=test.csv
    python experiments/contrastive.py pictures --data mine
    python experiments/contrastive.py clips --data mine --objectives.vtc-loss sigmoid
    vlmae evaluate runs/contrastive_clips --data kinetics --prompts "a video of {}"

No fusion, no masked words or patches: nothing has to be switched off, and nothing else is computed.
ViT-B/16 and a text tower of CLIP's size (12 x 512, mean of the tokens), from scratch; AdamW as
CLIP's B/16 (Radford et al. 2021, table 19: rate 5e-4, second beta 0.98, weight decay 0.2, cosine to
0). Batch, epochs and warm-up are ours, for data of some 100,000 pairs and more. To start from
published weights, `--train.init.video NAME`; to skip half of the patches in training,
`--model.video.mask.scheme random --model.video.mask.ratio 0.5` (FLIP).

Result: not yet run.
"""

from data_pipelines.schema.config import DataConfig, SourceConfig
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig, ObjectivesConfig, OptimConfig, TrainConfig
from vlmae.config.model import MaskConfig, ModelConfig, TextEncoderConfig, VideoEncoderConfig


def pictures() -> ExperimentConfig:
    """Pictures with texts."""
    return contrastive("contrastive_pictures", num_frames=1, batch_size=1024)


def clips() -> ExperimentConfig:
    """Clips with texts: four frames, encoded apart; their unit vectors are averaged."""
    return contrastive("contrastive_clips", num_frames=4, batch_size=256)


def contrastive(name: str, num_frames: int, batch_size: int) -> ExperimentConfig:
    """Build the two encoders for a data set that `--data` names."""
    return ExperimentConfig(
        name=name,
        data=DataConfig(
            train=(SourceConfig("mine", "train", num_frames=num_frames),),
            eval=SourceConfig("", "test", num_frames=num_frames),
            batch_size=batch_size,
            eval_batch_size=64,
            image_size=224,
            text_len=77,
            flip=False,  # texts may name left and right
            num_workers=8,
        ),
        model=ModelConfig(
            video=VideoEncoderConfig(mask=MaskConfig("none", 0.0)),
            text=TextEncoderConfig(
                width=512, depth=12, num_heads=8, mlp_dim=2048, max_len=77,
                dropout=0.0, pooling="mean",
            ),
            embed_dim=512,
        ),
        objectives=ObjectivesConfig(vtm=0.0, mlm=0.0, mvm=0.0),
        optim=OptimConfig(
            learning_rate=5e-4, warmup_share=0.1, final_ratio=0.0, b2=0.98, weight_decay=0.2
        ),
        train=TrainConfig(epochs=32.0, eval_every_epochs=1.0, save_every_epochs=1.0),
    )  # fmt: skip


VARIANTS = {"pictures": pictures, "clips": clips}

if __name__ == "__main__":
    main(VARIANTS)
