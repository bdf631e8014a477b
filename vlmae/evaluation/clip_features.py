"""Encoder outputs of all clips, kept once: each device holds the rows that it encoded.

What reads them (matching, questions, options) runs clip by clip on the device of the clip, so
features never cross the network, and each batch of clips is used once.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from vlmae.models.attention import take_rows as gather_rows
from vlmae.models.video_language import VideoLanguageModel
from vlmae.parallel.sharding import batch_shards, put_whole
from vlmae.runs.inference import EvalContext, jit_method

_ROOM = 0.6  # share of a device's memory that may be full before features go to the host


class ClipFeatures(NamedTuple):
    """Features by batches of the evaluation data; row r of the data is row r % size of a batch."""

    size: int  # rows of a batch, padding and clips that cannot be decoded included
    batches: list[Callable[[], PyTree]]  # each gives global arrays, sharded by rows


def keep(features: PyTree, mesh: Mesh) -> Callable[[], PyTree]:
    """Keep a batch where it is, or this process's part in host memory if its devices fill up."""
    stats = device_memory(mesh)
    if all(x["bytes_in_use"] < _ROOM * x["bytes_limit"] for x in stats):
        return lambda: features
    return offload(features)


def device_memory(mesh: Mesh) -> list[dict[str, int]]:
    """Ask this process's devices how full they are; CPUs do not say."""
    return [stats for device in mesh.local_devices if (stats := device.memory_stats())]


def offload(features: PyTree) -> Callable[[], PyTree]:
    """Copy the rows of this process's devices to the host; the result copies them back."""
    arrays, tree = jax.tree.flatten(features)
    parts = [[(x.device, np.asarray(x.data)) for x in a.addressable_shards] for a in arrays]
    kinds = [(a.shape, a.sharding) for a in arrays]

    def load() -> PyTree:
        placed = [[jax.device_put(x, device) for device, x in part] for part in parts]
        make = jax.make_array_from_single_device_arrays
        whole = [make(*kind, part) for kind, part in zip(kinds, placed, strict=True)]
        return jax.tree.unflatten(tree, whole)

    return load


def map_pairs(
    context: EvalContext,
    method: Callable[..., PyTree],
    features: ClipFeatures,
    clip_rows: Int[np.ndarray, " m"],
    inputs_of: Callable[[Int[np.ndarray, " b"]], tuple],
    **static: Any,
) -> PyTree:
    """Run a method on rows, each with the features of a clip.

    Args:
      context: the model.
      method: a function (model, video features, *inputs, **static) of equally many rows.
      features: of the clips.
      clip_rows: the clip of each row, by its number in the data.
      inputs_of: gives the host arrays of some rows, a tuple of trees.
      static: see `jit_method`.

    Returns:
      The results, row by row and whole in every process.
    """
    static = {"of_clips": method, "static": tuple(sorted(static.items()))}
    run = jit_method(context, _of_clips, _put_rows, **static)
    parts = batch_shards(context.mesh)
    whole = None
    for batch, within, rows, valid in _steps(features, clip_rows, parts, context.batch_size):
        found = run(features.batches[batch](), within, *inputs_of(rows.ravel()))
        if whole is None:
            whole = jax.tree.map(lambda x: np.empty((len(clip_rows), *x.shape[1:]), x.dtype), found)
        for result, x in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
            result[rows[valid]] = x[valid.ravel()]
    return whole


def _steps(
    features: ClipFeatures, clip_rows: Int[np.ndarray, " m"], parts: int, size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Divide rows into steps of one batch of clips, in which each shard reads its own clips.

    Yields:
      The batch; and for each shard (row) the clips within it, the rows, and which of them count.
    """
    batch, place = np.divmod(clip_rows, features.size)
    shard, within = np.divmod(place, features.size // parts)
    order = np.lexsort((within, shard, batch))  # neighbors read the same clip
    each = size // parts
    for number in np.unique(batch):
        first, last = np.searchsorted(batch[order], (number, number + 1))
        own = order[first:last]
        of_shards = [own[shard[own] == s] for s in range(parts)]
        for start in range(0, max(map(len, of_shards)), each):
            taken = [rows[start : start + each] for rows in of_shards]
            valid = np.arange(each) < np.array([[len(x)] for x in taken])
            rows = np.full(valid.shape, own[0])  # short ones repeat any row, which is left out
            rows[valid] = np.concatenate(taken)
            yield int(number), within[rows], rows, valid


def _of_clips(
    model: VideoLanguageModel,
    video: PyTree,
    within: Int[Array, "p n"],
    *inputs: PyTree,
    of_clips: Callable[..., PyTree],
    static: tuple[tuple[str, Any], ...],
) -> PyTree:
    """Run a method on the clips that each row names, counted within each shard."""
    video = jax.tree.map(lambda x: gather_rows(x, within), video)
    return of_clips(model, video, *inputs, **dict(static))


def _put_rows(inputs: PyTree, mesh: Mesh) -> PyTree:
    """Make global arrays of the rows; the features are some already."""
    return inputs[0], *put_whole(inputs[1:], mesh)
