"""EmojiVid from published weights: MiniLM for the text, a ViT-S/14 for the frames; or from scratch.

    vlmae prepare emojivid            # 800 MB of downloads, once
    vlmae fetch minilm                # 83 MB
    vlmae fetch vit_s14               # 90 MB; pip install -e ".[weights]"
    python experiments/offline/pretrained_emojivid.py
    python experiments/offline/pretrained_emojivid.py --sweep start,seed

Protocol B, as in `smaug_emojivid_pretrain.py`, with half of the patches masked. MiniLM's six layers
are four of the text encoder and two of the fusion, whose cross-attention is new. Both starts have
the same model, tokenizer, data and steps. Where the ViT's weights come from is not stated
(docs/guide/data.md): they may have seen emoji.

VTC uses the mean of a text's tokens, as MiniLM was trained to; its [CLS] is the same for all texts.

Result (one CPU core, jax 0.10.2, three seeds, 7 min a run): text to video R@1 / 5 / 10 of
3.8 / 12.1 / 19.4 among 220 clips, from scratch 0.5 / 2.6 / 6.1, where chance is 0.5 / 2.3 / 4.5.
"""

from collections.abc import Iterator

from experiments.offline import smaug_emojivid_pretrain
from experiments.sweeps import Changes, sweep_seed
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig, InitConfig, ObjectivesConfig
from vlmae.config.model import (
    FusionConfig,
    MaskConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
    VitLayout,
)
from vlmae.config.tree import override

MINILM, VIT_S14 = "~/.cache/vlmae/weights/minilm", "~/.cache/vlmae/weights/vit_s14"


def get_config() -> ExperimentConfig:
    """Architectures of the published weights (`vlmae weights FOLDER` prints the fields)."""
    return override(
        smaug_emojivid_pretrain.get_config(),
        {
            "name": "pretrained_emojivid",
            "data.image_size": 56,
            "data.batch_size": 32,
            "data.tokenizer": MINILM,
            "model.video": VideoEncoderConfig(
                width=384,
                depth=12,
                num_heads=6,
                mlp_dim=1536,
                patch_size=14,
                positions="learned",
                layout=VitLayout(layer_scale=1.0),
                mask=MaskConfig(ratio=0.5),
            ),
            "model.text": TextEncoderConfig(
                vocab_size=30522, width=384, depth=4, num_heads=12, mlp_dim=1536, pooling="mean"
            ),
            "model.fusion": FusionConfig(depth=2),
            "objectives": ObjectivesConfig(mlm=0.0, mvm=0.0),
            "optim.learning_rate": 1e-4,
            "optim.warmup_steps": 10,
            "train.init": InitConfig(text=MINILM, video=VIT_S14),
            "train.steps": 100,
            "train.log_every_steps": 10,
            "train.eval_every_steps": 0,
            "train.save_every_steps": 100,
        },
    )


def sweep_start() -> Iterator[Changes]:
    """Compare published weights, those of one encoder alone, and training from scratch."""
    for text, video in ((MINILM, VIT_S14), (MINILM, ""), ("", VIT_S14), ("", "")):
        yield {"train.init.text": text, "train.init.video": video}


if __name__ == "__main__":
    main(get_config, (sweep_start, sweep_seed))
