"""A trained model as jitted functions over host arrays, a fixed number of rows at a time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from vlmae.models.video_language import VideoLanguageModel
from vlmae.parallel.sharding import batch_sharding, put_whole, replicated

# Called now and then; with together=True by all processes at the same place, equally often.
OnProgress = Callable[..., None]


class EvalContext(NamedTuple):
    """Model, parameters and mesh of an evaluation, and the rows of one batch."""

    model: VideoLanguageModel
    params: PyTree
    mesh: Mesh
    batch_size: int
    on_progress: OnProgress = lambda **_: None  # called after each batch


def jit_method(
    context: EvalContext,
    method: Callable,
    put: Callable[[PyTree, Mesh], PyTree] = put_whole,
    *,
    keeps: bool = False,
    **static: Any,
) -> Callable[..., PyTree]:
    """Jit `method(bound model, *arrays, **static)` as a function from host arrays to host arrays.

    Equal models, methods and values share one program, so an evaluation that is repeated compiles
    nothing. A `functools.partial` may hold arrays, so it is compiled anew.

    Args:
      context: the model, its parameters and the mesh.
      method: a function of the bound model and arrays, or an unbound method of the model.
      put: makes global arrays of the host arrays. `put_whole` if every process holds all rows,
        `put_batch` if each holds its part.
      keeps: the method returns two trees, the second of which stays on the devices, in rows.
      static: further arguments, hashable, which the program holds as constants.

    Returns:
      The function; its results are whole in every process.
    """
    make = _program if isinstance(method, functools.partial) else _shared_program
    run = make(context.model, method, context.mesh, keeps, tuple(sorted(static.items())))

    def on_host(*inputs: PyTree) -> PyTree:
        results = run(context.params, *put(inputs, context.mesh))
        if keeps:
            # Ready as a whole: simulated devices may deadlock when two calls are under way.
            results = jax.device_get(results[0]), jax.block_until_ready(results[1])
        else:
            results = jax.device_get(results)
        context.on_progress(together=True)  # a program of all devices, so all processes run it
        return results

    return on_host


def _program(
    model: VideoLanguageModel,
    method: Callable,
    mesh: Mesh,
    keeps: bool,
    static: tuple[tuple[str, Any], ...],
) -> Callable[..., PyTree]:
    method = functools.partial(method, **dict(static)) if static else method

    def apply(params: PyTree, *inputs: PyTree) -> PyTree:
        return model.apply({"params": params}, *inputs, method=method)

    # Replicated outputs let every process fetch all rows without another collective of ours.
    whole = replicated(mesh)
    return jax.jit(apply, out_shardings=(whole, batch_sharding(mesh)) if keeps else whole)


_shared_program = functools.lru_cache(maxsize=64)(_program)


def map_rows(run: Callable[..., PyTree], inputs: tuple[PyTree, ...], batch_size: int) -> PyTree:
    """Run a function on all rows of host arrays, batch by batch, and join the results.

    Args:
      run: a function of arrays with `batch_size` rows each.
      inputs: trees of arrays with equally many rows, at least one.
      batch_size: rows of a call. A short last batch is filled, so `run` compiles only once.
    """
    count = len(jax.tree.leaves(inputs)[0])
    whole = None
    for start in range(0, count, batch_size):
        # A short last batch repeats the last row; the repetitions are cut off again.
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        part = take_rows(run(*take_rows(inputs, rows)), slice(count - start))
        if whole is None:  # made once: joining parts at the end would hold all rows twice
            whole = jax.tree.map(lambda x: np.empty((count, *x.shape[1:]), x.dtype), part)
        jax.tree.map(functools.partial(_write_rows, start), whole, part)
    return whole


def _write_rows(start: int, whole: np.ndarray, part: np.ndarray) -> None:
    whole[start : start + len(part)] = part


def take_rows(tree: PyTree, rows: np.ndarray | slice) -> PyTree:
    """Select the same rows of every array."""
    return jax.tree.map(lambda x: x[rows], tree)


def concatenate(parts: list[PyTree]) -> PyTree:
    """Join trees of host arrays along their rows."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
