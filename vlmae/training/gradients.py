"""Gradients of the losses of a batch: at once, or in micro-batches, in the memory of one of them.

VTC compares every row with every other one, so its mean over micro-batches is not the loss of the
batch. It is computed exactly all the same, in two passes (GradCache: Gao et al. 2021, "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup"; also in BASIC: Pham et al. 2021). The
first pass keeps only embeddings. From them follow the loss of the whole batch and its gradient with
respect to each embedding. The second pass hands these on to the parameters by the chain rule. The
price is one more forward pass of the encoders.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Key, PyTree

from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ObjectivesConfig
from vlmae.models.video_language import VideoLanguageModel
from vlmae.training.features import Context, Features, Loss, extract, keys_of
from vlmae.training.objectives import FUNCTIONS, Function, compute_losses
from vlmae.training.optim import freeze
from vlmae.training.pairs import Embeddings, contrast, embed
from vlmae.training.step_cost import FIRST_PASS

Gradients = Callable[[PyTree, Batch, Key[Array, ""]], tuple[PyTree, dict]]
Inputs = tuple[PyTree, Key[Array, " p"]]  # parts of a batch and their keys, stacked


def make_gradients(
    model: VideoLanguageModel,
    objectives: ObjectivesConfig,
    shards: int,
    parts: int,
    scales: Mapping[str, Array] | None = None,
) -> Gradients:
    """Build a function (parameters, batch, key) -> gradients and metrics.

    The batch is split into `parts` micro-batches. Losses are means over all rows, patches or tokens
    that count in any of them, and VTC is that of the whole batch. `scales` are the weights of the
    objectives where these are inputs of the program, see `compute_losses`.
    """
    options = {"model": model, "objectives": objectives}
    gradients = functools.partial(loss_gradients, **options, shards=shards, scales=scales)
    weights = functools.partial(weights_of, **options, shards=shards)
    if not objectives.vtc:  # nothing compares micro-batches: one pass is exact
        return accumulated(gradients, weights, parts)
    whole_vtc = functools.partial(
        vtc_of_batch,
        embeddings=functools.partial(embeddings_of, **options),
        contrast=functools.partial(contrast, config=objectives, shards=shards),
    )
    return accumulated(gradients, weights, parts, whole_vtc)


def loss_gradients(
    params: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    shares: Mapping[str, Array] | None = None,
    *,
    model: VideoLanguageModel,
    objectives: ObjectivesConfig,
    shards: int,
    functions: Mapping[str, Function] = FUNCTIONS,
    scales: Mapping[str, Array] | None = None,
) -> tuple[PyTree, dict]:
    """Compute gradients of the weighted losses, and metrics.

    Of a micro-batch `shares` are its shares in the means of the batch, by metric; the results of
    all micro-batches add up to those of the batch. For `shards`, `functions` and `scales` see
    `compute_losses`.
    """
    scales = objectives.weights if scales is None else scales
    # The same split in all passes over a batch, so that they draw equal masks and equal dropout.
    key, rngs = split_key(key)

    def loss_fn(params: PyTree) -> tuple[Array, dict]:
        # Frozen here and not in the optimizer alone, so that their backward pass is not computed.
        variables = {"params": freeze(params, model.config)}
        args = (batch, key, objectives, shards, functions, scales)
        loss = model.apply(variables, *args, method=compute_losses, rngs=rngs)
        if shares is None:
            return loss.value, loss.metrics
        # Scaled before they are summed: the sum over parts is then the mean of the batch, with no
        # division after it.
        metrics = {name: share * loss.metrics[name] for name, share in shares.items()}
        total = sum(scales[name] * metrics[f"loss/{name}"] for name in objectives.weights)
        return total, metrics | {"loss/total": total}

    return jax.grad(loss_fn, has_aux=True)(params)


def weights_of(
    params: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    *,
    model: VideoLanguageModel,
    objectives: ObjectivesConfig,
    shards: int,
) -> dict[str, Array]:
    """Count what each loss and metric is a mean of, with the masks of `loss_gradients`.

    Only masks decide, so the compiler drops the model, whose results nobody reads.
    """
    key, rngs = split_key(key)
    args = (batch, key, objectives, shards)
    loss = model.apply({"params": params}, *args, method=compute_losses, rngs=rngs)
    return {name: jnp.asarray(weight, jnp.float32) for name, weight in loss.weights.items()}


def embeddings_of(
    params: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    *,
    model: VideoLanguageModel,
    objectives: ObjectivesConfig,
) -> Embeddings:
    """Compute the embeddings that `loss_gradients` compares, with its masks and dropout."""
    key, rngs = split_key(key)

    def run(model: VideoLanguageModel) -> Embeddings:
        return embed(model, extract(model, batch, keys_of(key), objectives), objectives)

    return model.apply({"params": params}, method=run, rngs=rngs)


def split_key(key: Key[Array, ""]) -> tuple[Key[Array, ""], dict[str, Key[Array, ""]]]:
    """Split a key into that of the objectives and those of the model's own noise, by name."""
    objective_key, dropout_key, noise_key = jax.random.split(key, 3)
    return objective_key, {"dropout": dropout_key, "noise": noise_key}


def accumulated(
    gradients: Callable[..., tuple[PyTree, dict]],
    weights: Callable[[PyTree, Batch, Key[Array, ""]], dict[str, Array]],
    parts: int,
    whole_vtc: Callable[[PyTree, Batch, Inputs], tuple[Loss, Embeddings]] | None = None,
) -> Gradients:
    """Wrap gradients: run `parts` micro-batches one after the other and join the results.

    Args:
      gradients: (parameters, batch, key, shares) -> gradients and metrics, see `loss_gradients`.
      weights: (parameters, batch, key) -> what each metric is a mean of.
      parts: number of micro-batches.
      whole_vtc: see `vtc_of_batch`; takes the place of each micro-batch's own VTC.
    """
    if parts == 1:
        return gradients

    def mean_gradients(params: PyTree, batch: Batch, key: Key[Array, ""]) -> tuple[PyTree, dict]:
        # Row r goes to part r mod p, so that every device keeps its own rows.
        rows = jax.tree.map(lambda x: rearrange(x, "(b p) ... -> p b ...", p=parts), batch)
        # Each micro-batch has masks and dropout of its own.
        inputs = rows, jax.random.split(key, parts)
        counts = jax.lax.map(lambda part: weights(params, *part), inputs)
        # At least 1: where nothing counts in the whole batch, all shares are zero and not NaN.
        shares = jax.tree.map(lambda count: count / jnp.maximum(count.sum(), 1.0), counts)
        if whole_vtc is None:
            return sum_over_parts(functools.partial(gradients, params), (*inputs, shares))
        loss, grads = whole_vtc(params, batch, inputs)

        def part_gradients(
            batch: Batch, key: Key[Array, ""], shares: dict[str, Array], grads: Embeddings
        ) -> tuple:
            def surrogate(model: VideoLanguageModel, features: Features, context: Context) -> Loss:
                return surrogate_vtc(embed(model, features, context.config), loss, grads)

            return gradients(params, batch, key, shares, functions={**FUNCTIONS, "vtc": surrogate})

        return sum_over_parts(part_gradients, (*inputs, shares, grads))

    return mean_gradients


def vtc_of_batch(
    params: PyTree,
    batch: Batch,
    inputs: Inputs,
    *,
    embeddings: Callable[[PyTree, Batch, Key[Array, ""]], Embeddings],
    contrast: Callable[[Embeddings, Batch], Loss],
) -> tuple[Loss, Embeddings]:
    """Compute VTC of a whole batch, and its gradient by the embeddings of each part (GradCache).

    Args:
      params: parameters.
      batch: the whole batch.
      inputs: its parts and their keys, the parts along a leading axis.
      embeddings: (parameters, batch, key) -> the very embeddings that the second pass compares.
      contrast: (embeddings, batch) -> VTC.
    """
    parts = len(inputs[1])
    with jax.named_scope(FIRST_PASS):
        cached = jax.lax.map(lambda part: embeddings(params, *part), inputs)

    def whole_loss(cached: Embeddings) -> tuple[Array, Loss]:
        # In the order that the rows have in the batch, for its media ids.
        video, text = (rearrange(x, "p b ... -> (b p) ...") for x in (cached.video, cached.text))
        # All parts have the same temperature and bias, as one parameter gives each.
        scalars = jax.tree.map(lambda x: x[0], (cached.temperature, cached.bias))
        loss = contrast(Embeddings(video, text, *scalars), batch)
        return loss.value, loss

    grads, loss = jax.grad(whole_loss, has_aux=True)(cached)
    # Each part holds the whole loss, so its share is one of `parts`; these gradients add up.
    return loss, jax.tree.map(lambda grad: grad * parts, grads)


def surrogate_vtc(embeddings: Embeddings, whole: Loss, grads: Embeddings) -> Loss:
    """Surrogate VTC loss of one micro-batch: value of the whole batch, gradient of its own rows.

    Args:
      embeddings: of the micro-batch.
      whole: loss of the whole batch.
      grads: derivatives of that loss with respect to these embeddings.
    """

    # The value is the whole loss's, so that logs show it; the gradient is the cached one.
    def linear(x: Array, grad: Array) -> Array:  # zero, with derivative `grad`
        return jnp.sum(grad * (x - jax.lax.stop_gradient(x)))

    terms = jax.tree.leaves(jax.tree.map(linear, embeddings, grads))
    return Loss(whole.value + sum(terms), whole.metrics)


def sum_over_parts(function: Callable[..., PyTree], inputs: PyTree) -> PyTree:
    """Sum function(*part) over the leading dimension of `inputs`, one part after the other.

    A scan, so that the memory of one part is enough.
    """
    # Shapes first, since the sum starts from zeros: peeling off a first part would compile it
    # twice.
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], inputs))

    def add(total: PyTree, part: tuple) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, inputs)[0]
