"""Multi-label classification on HVU: mean average precision (MuLTI).

    vlmae prepare hvu --manual-dir DIR
    python experiments/multi/hvu_labels.py

16 frames; HVU has no text, so the text is empty: with titles or speech of your own, give them as
captions through a manifest. Learning rate, 5 epochs and the number of clips (about 480,000) are
ours.

Result: not yet run.
"""

from data_pipelines.schema.config import SourceConfig
from experiments.recipes import AT_THE_END, NO_PRETRAINING, multi, schedule
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Binary cross-entropy over all labels."""
    return multi(
        "multi_hvu_labels",
        SourceConfig("hvu", "train", num_frames=16),
        SourceConfig("", "val", num_frames=16),
        {
            "data.task": "labels",
            **schedule(epochs=5, warmup=0.1),
            **AT_THE_END,
            "data.text_len": 512,
            **NO_PRETRAINING,
            "objectives.label": 1.0,
            "optim.learning_rate": 5e-5,
        },
    )


if __name__ == "__main__":
    main(get_config)
