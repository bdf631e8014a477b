"""A small model on the user's own clips; splits and sizes follow from what is prepared.

It trains from scratch, in minutes on a CPU. `docs/guide/own-videos.md` says how to grow it.
"""

from typing import NamedTuple

from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.storage.row_counts import count_rows
from data_pipelines.storage.stored import dataset_folder, is_prepared, read_info, read_texts
from experiments.sweeps import Changes
from vlmae.config.experiment import ExperimentConfig, ObjectivesConfig, OptimConfig, TrainConfig
from vlmae.config.model import (
    FusionConfig,
    MaskConfig,
    ModelConfig,
    PixelDecoderConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)
from vlmae.config.tree import override

NAME = "mine"  # without --data NAME
HELD_OUT = ("test", "val", "validation", "dev")  # splits to evaluate on, the first that is there
MAX_TEXT_LEN, MAX_BATCH = 64, 32
STEPS, EPOCHS = 300, 10.0  # the longer of the two


class Fit(NamedTuple):
    """Splits and sizes that fit a prepared data set."""

    train: str
    evaluation: str
    batch_size: int
    epochs: float
    options: int
    """Options of its multiple-choice questions; 0: it has none."""


UNKNOWN = Fit("train", "test", batch_size=16, epochs=EPOCHS, options=0)


def small(name: str, data: str, data_dir: str, task: str, changes: Changes) -> ExperimentConfig:
    """Build a small model for a task on a prepared data set.

    Args:
      name: of the task; the run lies in runs/DATA_NAME.
      data: the data set; one that is not prepared is reported when the run begins.
      data_dir: folder of prepared data sets.
      task: see `DataConfig.task`; decides what is counted as an epoch.
      changes: values of further fields, by dotted names.
    """
    fit = fit_to(data, data_dir, task) if is_prepared(data, data_dir) else UNKNOWN
    config = ExperimentConfig(
        name=f"{data}_{name}",
        data=DataConfig(
            train=(SourceConfig(data, fit.train, num_frames=4),),
            eval=SourceConfig("", fit.evaluation, num_frames=4),
            data_dir=data_dir,
            task=task,
            batch_size=fit.batch_size,
            eval_batch_size=16,
            image_size=64,
            text_len=0,  # the longest one
            min_crop_scale=0.6,
            flip=False,  # texts may name left and right
            num_workers=1,
        ),
        model=ModelConfig(
            video=VideoEncoderConfig(
                width=96, depth=4, num_heads=3, mlp_dim=384, patch_size=8,
                time_frames=4, time_depth=1, mask=MaskConfig("none", 0.0),
            ),
            text=TextEncoderConfig(
                width=96, depth=2, num_heads=3, mlp_dim=384, max_len=MAX_TEXT_LEN, dropout=0.1
            ),
            fusion=FusionConfig(depth=1),
            pixel_decoder=PixelDecoderConfig(width=64, depth=1, num_heads=2),
            embed_dim=128,
            dtype="float32",
        ),
        # From scratch VTM learns nothing from hard negatives for long.
        objectives=ObjectivesConfig(mlm=0.0, mvm=0.0, vtm_hardness=0.0, mcm_len=MAX_TEXT_LEN),
        optim=OptimConfig(learning_rate=1e-3, warmup_share=0.1, weight_decay=0.05, clip_norm=1.0),
        train=TrainConfig(
            epochs=fit.epochs, log_every_steps=20, eval_every_steps=100, save_every_steps=100
        ),
    )  # fmt: skip
    return override(config, changes)


def fit_to(data: str, data_dir: str, task: str) -> Fit:
    """Choose splits and sizes by what a prepared data set holds."""
    folder = dataset_folder(data, data_dir)
    train, evaluation = choose_splits([*read_info(folder).splits])
    config = DataConfig(train=(SourceConfig(data, train),), data_dir=data_dir, task=task)
    clips, rows = count_rows(config.train[0], config)
    # A power of two, at most half of the clips: a batch should hold each of them once.
    batch_size = min(MAX_BATCH, 1 << max(1, (clips // 2).bit_length() - 1))
    items = read_texts(config.train[0], data_dir)
    options = [len(question.options) for item in items for question in item.questions]
    return Fit(
        train,
        evaluation,
        batch_size,
        epochs=max(EPOCHS, round(STEPS * batch_size / max(1, rows), 1)),
        options=max(options, default=0),
    )


def choose_splits(names: list[str]) -> tuple[str, str]:
    """Choose what to train and what to evaluate on; without a second split, 80 and 20 % of one.

    >>> choose_splits(["train", "test"]), choose_splits(["train"])
    (('train', 'test'), ('train[:80%]', 'train[80%:]'))
    """
    train = "train" if "train" in names else names[0]
    held_out = next((name for name in HELD_OUT if name in names and name != train), None)
    return (train, held_out) if held_out else (f"{train}[:80%]", f"{train}[80%:]")
