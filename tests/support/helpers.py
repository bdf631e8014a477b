"""A model small enough to compile in seconds, and batches for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from data_pipelines.schema.config import DataConfig
from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ExperimentConfig, ObjectivesConfig
from vlmae.config.model import (
    FusionConfig,
    MaskConfig,
    ModelConfig,
    PixelDecoderConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.training.objectives import compute_losses

PAD, CLS, SEP, MASK, FIRST_WORD, VOCAB = 0, 1, 2, 3, 4, 40

SMALL = ExperimentConfig(
    data=DataConfig(batch_size=6, image_size=16, text_len=8),
    model=ModelConfig(
        video=VideoEncoderConfig(
            width=16, depth=1, num_heads=2, mlp_dim=32, patch_size=4, mask=MaskConfig(ratio=0.65)
        ),
        text=TextEncoderConfig(
            vocab_size=VOCAB,
            cls_id=CLS,
            mask_id=MASK,
            max_len=12,
            width=16,
            depth=1,
            num_heads=2,
            mlp_dim=32,
            dropout=0.1,
        ),
        fusion=FusionConfig(depth=1),
        pixel_decoder=PixelDecoderConfig(width=16, depth=1, num_heads=2),
        embed_dim=8,
        dtype="float32",
    ),
    # Unequal weights, so that a forgotten one shows.
    objectives=ObjectivesConfig(vtc=1.0, vtm=2.0, mlm=0.5, mvm=3.0),
)


def small_model(**changes) -> VideoLanguageModel:
    """The small model, without dropout, with fields of its `ModelConfig` replaced."""
    model = dataclasses.replace(SMALL.model, **changes)
    return build_model(dataclasses.replace(SMALL, model=model))


def random_batch(size: int = 6, frames: int = 2, seed: int = 0) -> Batch:
    """Noise for frames, random words for captions; all rows are valid, all ids differ."""
    rng = np.random.default_rng(seed)
    length, image = SMALL.data.text_len, SMALL.data.image_size
    text_mask = np.arange(length) < rng.integers(3, length + 1, (size, 1))
    ids = rng.integers(FIRST_WORD, VOCAB, (size, length), dtype=np.int32)
    ids[:, 0] = CLS
    batch = Batch(
        video=rng.integers(0, 256, (size, frames, image, image, 3), dtype=np.uint8),
        text_ids=np.where(text_mask, ids, np.int32(PAD)),
        text_mask=text_mask,
        media_ids=np.arange(size, dtype=np.int32),
        valid=np.ones(size, bool),
    )
    return jax.tree.map(jnp.asarray, batch)


def init_params(
    model: VideoLanguageModel, batch: Batch, objectives: ObjectivesConfig = SMALL.objectives
) -> PyTree:
    """Parameters of the parts that the objectives use."""

    def run(model: VideoLanguageModel, batch: Batch) -> dict:
        return compute_losses(model, batch, jax.random.key(0), objectives).metrics

    return model.init(jax.random.key(0), batch, method=run)["params"]


def randomize(params: PyTree, seed: int = 0) -> PyTree:
    """Noise on every parameter, so that no bias is zero and no scale is one."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noise = [0.2 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, [x + n for x, n in zip(leaves, noise, strict=True)])


def drawn_keys(monkeypatch) -> list[tuple[int, ...]]:
    """A list that grows by the key of every draw from now on, as plain numbers."""
    keys = []
    for name in ("bernoulli", "uniform", "randint"):
        real = getattr(jax.random, name)

        def draw(key, *args, real=real, **kwargs):
            keys.append(key_numbers(key))
            return real(key, *args, **kwargs)

        monkeypatch.setattr(jax.random, name, draw)
    return keys


def key_numbers(key) -> tuple[int, ...]:
    """A key as plain numbers, which can be compared."""
    return tuple(np.asarray(jax.random.key_data(key)).tolist())
