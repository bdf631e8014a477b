"""Gradients of the losses of a batch: at once, or part by part in the memory of one part.

VTC compares every row with every other one, so that the mean over parts is not the loss of the
whole. It is computed exactly all the same, in two passes over the parts (GradCache: Gao et al.
2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"; also in BASIC:
Pham et al. 2021). The first pass keeps nothing but embeddings, from which the loss of the whole
batch and its gradient with respect to each of them follow; the second one hands these on to the
parameters, by the chain rule. The price is one more forward pass of the encoders.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Key, PyTree

from data_pipelines.records import Batch
from vlmae.config import ObjectivesConfig
from vlmae.models.video_language import VideoLanguageModel
from vlmae.objectives import (
    OBJECTIVES,
    Embeddings,
    Features,
    Loss,
    compute_losses,
    contrast,
    embed,
    extract,
    keys_of,
)
from vlmae.optim import freeze

Gradients = Callable[[PyTree, Batch, Key[Array, ""]], tuple[PyTree, dict]]


def make_gradients(
    model: VideoLanguageModel, objectives: ObjectivesConfig, shards: int, parts: int
) -> Gradients:
    """(parameters, batch, key) -> gradients and metrics, with the batch in so many parts.

    The losses are the means over the parts, but for VTC, which is that of the whole batch.
    """
    options = {"model": model, "objectives": objectives}
    gradients = functools.partial(loss_gradients, **options, shards=shards)
    if parts == 1 or not objectives.vtc:
        return accumulated(gradients, parts)
    return accumulated_with_vtc(
        gradients,
        functools.partial(embeddings_of, **options),
        functools.partial(contrast, config=objectives, shards=shards),
        parts,
    )


def loss_gradients(
    params: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    *,
    model: VideoLanguageModel,
    objectives: ObjectivesConfig,
    shards: int,
    functions: Mapping[str, Callable[..., Loss]] = OBJECTIVES,
) -> tuple[PyTree, dict]:
    """Gradients of the weighted losses, and the metrics.

    For `shards` and `functions` (there `objectives`) see `compute_losses`.
    """
    key, rngs = split_key(key)

    def loss_fn(params: PyTree) -> tuple[Array, dict]:
        variables = {"params": freeze(params, model.config)}
        args = (batch, key, objectives, shards, functions)
        return model.apply(variables, *args, method=compute_losses, rngs=rngs)

    return jax.grad(loss_fn, has_aux=True)(params)


def embeddings_of(
    params: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    *,
    model: VideoLanguageModel,
    objectives: ObjectivesConfig,
) -> Embeddings:
    """The embeddings that `loss_gradients` compares: of the same masks, words and dropout."""
    key, rngs = split_key(key)
    keys = keys_of(key)

    def run(model: VideoLanguageModel) -> Embeddings:
        return embed(model, extract(model, batch, keys["mask"], keys["mlm"], objectives))

    return model.apply({"params": params}, method=run, rngs=rngs)


def split_key(key: Key[Array, ""]) -> tuple[Key[Array, ""], dict[str, Key[Array, ""]]]:
    """The key of the objectives, and those of the model's own randomness by name."""
    objective_key, dropout_key, noise_key = jax.random.split(key, 3)
    return objective_key, {"dropout": dropout_key, "noise": noise_key}


def accumulated(gradients: Gradients, parts: int) -> Gradients:
    """Wraps gradients: the batch in `parts`, one after the other, with the means of the results."""
    if parts == 1:
        return gradients

    def mean_gradients(params: PyTree, batch: Batch, key: Key[Array, ""]) -> tuple[PyTree, dict]:
        keys = jax.random.split(key, parts)
        part_gradients = functools.partial(gradients, params)
        return mean_over_parts(part_gradients, (split_rows(batch, parts), keys))

    return mean_gradients


def accumulated_with_vtc(
    gradients: Callable[..., tuple[PyTree, dict]],
    embeddings: Callable[[PyTree, Batch, Key[Array, ""]], Embeddings],
    contrast: Callable[[Embeddings, Batch], Loss],
    parts: int,
) -> Gradients:
    """Like `accumulated`, with the VTC of the whole batch.

    Args:
      gradients: as for `accumulated`; takes the objectives as `functions`.
      embeddings: (parameters, batch, key) -> the very embeddings that `gradients` makes of them.
      contrast: VTC of a batch by its embeddings.
      parts: how many.
    """

    def mean_gradients(params: PyTree, batch: Batch, key: Key[Array, ""]) -> tuple[PyTree, dict]:
        inputs = split_rows(batch, parts), jax.random.split(key, parts)
        cached = jax.lax.map(lambda part: embeddings(params, *part), inputs)

        def whole(cached: Embeddings) -> tuple[Array, Loss]:
            loss = contrast(join_parts(cached), batch)
            return loss.value, loss

        slopes, loss = jax.grad(whole, has_aux=True)(cached)
        # Results are averaged over the parts, but the parts' shares of this gradient add up.
        slopes = jax.tree.map(lambda slope: slope * parts, slopes)

        def part_gradients(batch: Batch, key: Key[Array, ""], slopes: Embeddings) -> tuple:
            share = functools.partial(share_of_vtc, whole=loss, slopes=slopes)
            return gradients(params, batch, key, functions={**OBJECTIVES, "vtc": share})

        return mean_over_parts(part_gradients, (*inputs, slopes))

    return mean_gradients


def share_of_vtc(
    model: VideoLanguageModel,
    features: Features,
    batch: Batch,
    key: Key[Array, ""],
    config: ObjectivesConfig,
    shards: int = 1,
    *,
    whole: Loss,
    slopes: Embeddings,
) -> Loss:
    """An objective in the place of `vtc`: its value is the loss of the whole batch, its gradient
    the share of this part's embeddings.

    Args:
      model, features, batch, key, config, shards: of the part, as for every objective.
      whole: the loss of the whole batch.
      slopes: its derivatives with respect to the part's embeddings.
    """

    def change(x: Array, slope: Array) -> Array:
        return jnp.sum(slope * (x - jax.lax.stop_gradient(x)))

    changes = jax.tree.map(change, embed(model, features), slopes)
    return Loss(whole.value + sum(changes), whole.metrics)


def split_rows(batch: PyTree, parts: int) -> PyTree:
    """[(b p) ...] -> [p b ...] of every array; part i gets the rows r with r mod p = i.

    So every device keeps its own rows.
    """
    return jax.tree.map(lambda x: rearrange(x, "(b p) ... -> p b ...", p=parts), batch)


def join_parts(embeddings: Embeddings) -> Embeddings:
    """The embeddings of all parts [p b ...], with the rows as before `split_rows`."""
    video, text, temperatures = embeddings
    video, text = (rearrange(x, "p b ... -> (b p) ...") for x in (video, text))
    return Embeddings(video, text, temperatures[0])  # they are all the same one


def mean_over_parts(function: Callable[..., PyTree], inputs: PyTree) -> PyTree:
    """The mean of function(*part) over the leading dimension of `inputs`, one after the other."""
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], inputs))

    def add(total: PyTree, part: tuple) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, inputs)
    parts = len(jax.tree.leaves(inputs)[0])
    return jax.tree.map(lambda x: x / parts, total)
