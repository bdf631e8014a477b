"""Encoded clips and texts of an evaluation split, shared by all evaluators."""

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from data_pipelines.loading.evaluation import EvalData
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Batch, Texts
from vlmae.config.experiment import EvaluationConfig, ObjectivesConfig
from vlmae.evaluation import clip_features
from vlmae.models.video_language import VideoLanguageModel
from vlmae.parallel.sharding import process_part, put_batch
from vlmae.runs.inference import EvalContext, concatenate, jit_method, map_rows, take_rows


class Encoded(NamedTuple):
    """Encoded clips or texts; all but the features of clips are host arrays, row by row."""

    embeddings: Float[np.ndarray, "n e"] | None  # unit vectors in the shared space
    features: PyTree  # encoder outputs, for the fusion (of clips `ClipFeatures`); or None
    media_ids: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]  # row numbers in the data, ascending


class Temperatures(NamedTuple):
    """Temperatures of InfoNCE by direction of retrieval, and the split that they are fitted on."""

    split: str = "the split itself"
    by_direction: Mapping[str, float] = MappingProxyType({})  # empty: fitted when evaluated


class EvalInputs(NamedTuple):
    """Inputs of an evaluator beside the model."""

    data: EvalData
    clips: Encoded | None  # with what the evaluator asks for, see `evaluators.Evaluator`
    config: EvaluationConfig
    objectives: ObjectivesConfig
    temperatures: Temperatures = Temperatures()


def encode_clips(
    context: EvalContext, data: EvalData, *, embed: bool = True, keep_features: bool = False
) -> Encoded:
    """Encode every clip once, unmasked; clips that cannot be decoded are left out.

    Args:
      context: the model.
      data: the clips.
      embed: project them into the shared space (the mean over frames).
      keep_features: keep what the fusion reads of them, on the devices that computed it.
    """
    run = jit_method(
        context, _encode_video, put_batch, keeps=True, embed=embed, keep_features=keep_features
    )
    kept, size = [], 0

    def encode(batch: Batch) -> PyTree:
        nonlocal size
        found, features = run(batch)
        if keep_features:
            size = len(jax.tree.leaves(features)[0])
            kept.append(clip_features.keep(features, context.mesh))
        return found

    (embeddings, media_ids), rows = _map_batches(context, data, encode)
    features = clip_features.ClipFeatures(size, kept) if keep_features else None
    return Encoded(embeddings, features, media_ids, rows)


def _encode_video(
    model: VideoLanguageModel, batch: Batch, embed: bool, keep_features: bool
) -> tuple[tuple[PyTree, Array], PyTree]:
    features = model.encode_video(batch.video)
    embeddings = model.embed_video(features).mean(axis=1) if embed else None
    return ((embeddings, batch.media_ids), batch.valid), features if keep_features else None


def map_clips(
    context: EvalContext, data: EvalData, method: Callable[[VideoLanguageModel, Batch], PyTree]
) -> tuple[PyTree, Int[np.ndarray, " n"]]:
    """Run `method` on every clip that can be decoded; each process decodes its part of them.

    The method returns its results and `batch.valid`.

    Returns:
      Results of all clips, whole in every process, and the clips' row numbers in the data.
    """
    return _map_batches(context, data, jit_method(context, method, put_batch))


def _map_batches(
    context: EvalContext, data: EvalData, run: Callable[[Batch], PyTree]
) -> tuple[PyTree, Int[np.ndarray, " n"]]:
    parts, masks = [], []
    with contextlib.closing(data.batches(*process_part(context.mesh))) as batches:
        for batch in batches:
            result, valid = run(batch)
            # Bad clips go through the model too, so that all batches have one shape.
            parts.append(take_rows(result, valid))
            masks.append(valid)
    return concatenate(parts), np.flatnonzero(np.concatenate(masks))


def encode_texts(context: EvalContext, texts: Texts, *, keep_features: bool = False) -> Encoded:
    """Encode every text into the shared space; keep its features if it is to be fused."""
    run = jit_method(context, _encode_text, keep_features=keep_features)
    encoded = map_rows(run, (texts.text_ids, texts.text_mask), context.batch_size)
    return Encoded(*encoded, texts.media_ids, np.arange(len(texts.media_ids)))


def _encode_text(
    model: VideoLanguageModel,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    keep_features: bool,
) -> tuple[Array, PyTree]:
    text = model.encode_text(ids, mask)
    return model.embed_text(text), text if keep_features else None


def select_texts(texts: Texts, keep: Bool[np.ndarray, " q"]) -> Texts:
    """Select the texts where `keep` is True: those that have a clip.

    Raises:
      UserError: none has.
    """
    if not keep.any():
        raise UserError(f"none of the {len(texts.captions)} captions has a usable clip")
    return take_texts(texts, np.flatnonzero(keep))


def take_texts(texts: Texts, places: Int[np.ndarray, " m"]) -> Texts:
    """Take texts by their places."""
    return Texts(*(x[places] for x in texts[:-1]), tuple(texts.captions[i] for i in places))
