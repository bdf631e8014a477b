"""Pre-train a small SMAUG on your own clips and captions, and retrieve clips by text.

    vlmae prepare manifest --name mine --split train=clips.csv
    python experiments/own/pretrain.py --data mine

VTC, VTM, MLM and MVM with half of the patches masked. Clips of the split `test` or `val` are
retrieved, or else the last 20 % of `train`, which is then trained on without them.

Result: not yet run to its end; docs/guide/own-videos.md runs it at a tiny size, in its test.
"""

from data_pipelines.schema.config import DataConfig
from experiments.own.recipes import NAME, small
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig


def get_config(data: str = NAME, data_dir: str = DataConfig.data_dir) -> ExperimentConfig:
    """All four objectives; the folder is runs/DATA_pretrain."""
    changes = {
        "model.video.mask.scheme": "random",
        "model.video.mask.ratio": 0.5,
        "objectives.mlm": 1.0,
        "objectives.mvm": 1.0,
    }
    return small("pretrain", data, data_dir, "captions", changes)


if __name__ == "__main__":
    main(get_config)
