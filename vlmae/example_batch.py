"""Batches without data: what the training step of an experiment takes, as shapes or as noise."""

import jax
import numpy as np

from data_pipelines.config import SourceConfig
from data_pipelines.records import Batch
from vlmae.config import ExperimentConfig


def abstract_batch(
    config: ExperimentConfig, source: SourceConfig | None = None, batch_size: int | None = None
) -> Batch:
    """Shapes of a training batch, with all fields that the pipeline gives it.

    Args:
      config: the experiment.
      source: what the batch is of; None: the one with the most frames, which needs all parts of
        the model.
      batch_size: rows; None: those of the config.
    """
    data = config.data
    source = source or max(data.train, key=lambda source: source.num_frames)
    rows = batch_size or data.batch_size
    size, length = data.image_size, data.text_len
    fields = {
        "video": ((source.num_frames, size, size, 3), "uint8"),
        "text_ids": ((length,), "int32"),
        "text_mask": ((length,), "bool"),
        "media_ids": ((), "int32"),
        "valid": ((), "bool"),
    }
    if data.num_others:
        shape = (data.num_others, length)
        fields |= {"other_ids": (shape, "int32"), "other_mask": (shape, "bool")}
    if config.model.num_classes:
        fields["targets"] = ((config.model.num_classes,), "bool")
    if data.answer_len:
        shape = (data.answer_len,)
        fields |= {"answer_ids": (shape, "int32"), "answer_mask": (shape, "bool")}
    return Batch(
        **{
            name: jax.ShapeDtypeStruct((rows, *shape), dtype)
            for name, (shape, dtype) in fields.items()
        }
    )


def random_batch(shapes: Batch, vocab_size: int) -> Batch:
    """Noise for pixels, any words of the vocabulary, and all rows valid and different."""
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        return rng.integers(0, 256 if x.dtype == np.uint8 else vocab_size, x.shape, x.dtype)

    media_ids = np.arange(len(shapes.valid), dtype=np.int32)
    return jax.tree.map(fill, shapes)._replace(media_ids=media_ids)
