"""Multi-label classification on HVU: mean average precision (MuLTI).

    python -m data_pipelines.prepare hvu --manual-dir DIR
    python experiments/multi_hvu_labels.py

16 frames; HVU has no text, so the text is empty: with titles or speech of your own, give them as
captions through a manifest. Learning rate, 5 epochs and the number of clips (about 480,000) are
ours. `--evaluation.resamples 20`: the interval of the mean average precision over thousands of
labels takes long.

Result: not yet run.
"""

from data_pipelines.config import SourceConfig
from experiments._finetune import multi, schedule
from vlmae.cli import main
from vlmae.config import ExperimentConfig


def get_config() -> ExperimentConfig:
    """Binary cross-entropy over all labels."""
    return multi(
        "multi_hvu_labels",
        SourceConfig("hvu", "train", num_frames=16),
        SourceConfig("hvu", "val", num_frames=16),
        {
            "data.task": "labels",
            **schedule(480_000, epochs=5, warmup=0.05),
            "data.text_len": 512,
            "objectives.vtc": 0.0,
            "objectives.vtm": 0.0,
            "objectives.label": 1.0,
            "optim.learning_rate": 5e-5,
            "evaluation.resamples": 20,
        },
    )


if __name__ == "__main__":
    main(get_config)
