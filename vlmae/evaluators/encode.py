"""What all evaluators share: a trained model as programs over host arrays; encoded clips, texts."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from data_pipelines.evaluation import EvalData
from data_pipelines.records import Batch, Texts
from vlmae.models.video_language import VideoLanguageModel
from vlmae.sharding import process_part, put_batch, put_whole, replicated


class Trained(NamedTuple):
    """A model with its parameters, where it runs, and how many rows go through it at a time."""

    model: VideoLanguageModel
    params: PyTree
    mesh: Mesh
    batch_size: int
    on_progress: Callable[[], None] = lambda: None  # called after each batch


class Encoded(NamedTuple):
    """Host copies of clips or texts, row by row."""

    embeddings: Float[np.ndarray, "n e"] | None  # in the shared space
    features: PyTree  # what the encoder made of them, or None
    media_ids: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]  # their places in the data


class Chunk(NamedTuple):
    """Rows that go through a program together."""

    rows: Int[np.ndarray, " b"]  # row numbers; the last one is repeated to fill the chunk
    size: int  # how many of them are real


def program(
    trained: Trained, method: Callable, put: Callable[[PyTree, Mesh], PyTree] = put_whole
) -> Callable[..., PyTree]:
    """`method(bound model, *arrays)`, jitted: takes host arrays and returns host arrays.

    `put` makes global arrays of them; the results are whole in every process.
    """

    def apply(params: PyTree, *inputs: PyTree) -> PyTree:
        return trained.model.apply({"params": params}, *inputs, method=method)

    run = jax.jit(apply, out_shardings=replicated(trained.mesh))

    def on_host(*inputs: PyTree) -> PyTree:
        results = jax.device_get(run(trained.params, *put(inputs, trained.mesh)))
        trained.on_progress()
        return results

    return on_host


def encode_clips(
    trained: Trained, data: EvalData, *, embed: bool = True, keep_features: bool = False
) -> Encoded:
    """Encodes every clip once, unmasked; those that cannot be decoded are left out.

    Args:
      trained: the model.
      data: the clips.
      embed: whether to compare them in the shared space (the mean over frames).
      keep_features: whether anything is fused with them.
    """

    def encode(model: VideoLanguageModel, batch: Batch) -> tuple[Array | None, PyTree, Array]:
        features = model.encode_video(batch.video)
        embeddings = model.embed_video(features).mean(axis=1) if embed else None
        return embeddings, features if keep_features else None, batch.media_ids

    encoded, rows = map_clips(trained, data, encode)
    return Encoded(*encoded, rows)


def map_clips(
    trained: Trained, data: EvalData, method: Callable[[VideoLanguageModel, Batch], PyTree]
) -> tuple[PyTree, Int[np.ndarray, " n"]]:
    """`method` on every clip that can be decoded; each process decodes its part of them.

    Returns:
      Its results in one piece, whole in every process, and the clips' rows in the data.
    """

    def apply(model: VideoLanguageModel, batch: Batch) -> tuple[PyTree, Array]:
        return method(model, batch), batch.valid

    run, parts, valid = program(trained, apply, put_batch), [], []
    with contextlib.closing(data.batches(*process_part(trained.mesh))) as batches:
        for batch in batches:
            result, is_clip = run(batch)
            parts.append(take_rows(result, is_clip))
            valid.append(is_clip)
    return concatenate(parts), np.flatnonzero(np.concatenate(valid))


def encode_texts(trained: Trained, texts: Texts, *, keep_features: bool = False) -> Encoded:
    """Encodes every text, for the shared space and, if asked for, to be fused."""

    def encode(
        model: VideoLanguageModel, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> tuple[Array, PyTree]:
        text = model.encode_text(ids, mask)
        return model.embed_text(text), text if keep_features else None

    run = program(trained, encode)
    inputs = (texts.text_ids, texts.text_mask)
    encoded = map_rows(run, inputs, trained.batch_size)
    return Encoded(*encoded, texts.media_ids, np.arange(len(texts.media_ids)))


def select_texts(texts: Texts, clip_ids: Int[np.ndarray, " n"]) -> Texts:
    """The texts that have a clip.

    Raises:
      ValueError: none has.
    """
    rows = np.flatnonzero(np.isin(texts.media_ids, clip_ids))
    if not len(rows):
        raise ValueError(f"none of the {len(texts.captions)} captions has a usable clip")
    captions = tuple(texts.captions[row] for row in rows)
    return Texts(texts.text_ids[rows], texts.text_mask[rows], texts.media_ids[rows], captions)


def clip_rows(clips: Encoded, media_ids: Int[np.ndarray, " q"]) -> Int[np.ndarray, " q"]:
    """The row of the first clip of each media id; every id has one."""
    return (clips.media_ids == media_ids[:, None]).argmax(axis=1)


def map_rows(run: Callable[..., PyTree], inputs: tuple[PyTree, ...], batch_size: int) -> PyTree:
    """`run` on all rows of host arrays, chunk by chunk; its results in one piece."""
    count = len(jax.tree.leaves(inputs)[0])
    results = [
        take_rows(run(*take_rows(inputs, chunk.rows)), slice(chunk.size))
        for chunk in chunks(count, batch_size)
    ]
    return concatenate(results)


def chunks(count: int, size: int) -> list[Chunk]:
    """All of `count` rows in chunks of one size, so that one program serves them all."""
    starts = range(0, count, size)
    return [
        Chunk(np.minimum(np.arange(s, s + size), count - 1), min(size, count - s)) for s in starts
    ]


def take_rows(tree: PyTree, rows: np.ndarray | slice) -> PyTree:
    """The same rows of every array."""
    return jax.tree.map(lambda x: x[rows], tree)


def concatenate(parts: list[PyTree]) -> PyTree:
    """Trees of host arrays, one below the other."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
