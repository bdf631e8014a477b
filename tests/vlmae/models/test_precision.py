"""Float32 where rounding would change results, finite gradients, and initial deviations."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize, small_model
from oracles import random

from vlmae.config.model import (
    FrameSelectorConfig,
    FusionConfig,
    SamplerConfig,
    SparsifyConfig,
    TextEncoderConfig,
)
from vlmae.models.attention import Source
from vlmae.models.blocks import bert_block
from vlmae.models.heads import Projection
from vlmae.models.layers import Compute, dot_tables
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.ops import losses
from vlmae.ops.losses import safe_norm
from vlmae.ops.token_pruning import norm_score
from vlmae.training.features import Context, Features, FusedPairs
from vlmae.training.objectives import FUNCTIONS, compute_losses
from vlmae.training.step_cost import inner_jaxprs

KEY = jax.random.key(0)

# --- bfloat16

ISLANDS = {"exp", "exp2", "log", "log1p", "logistic", "top_k", "sort", "argmax", "reduce_max"}


def primitives(jaxpr, found=None):
    """Every primitive of a program with the types of its inputs, those of inner programs too."""
    found = set() if found is None else found
    for eqn in jaxpr.eqns:
        found |= {(eqn.primitive.name, str(x.aval.dtype)) for x in eqn.invars if hasattr(x, "aval")}
        for inner in inner_jaxprs(eqn):
            primitives(inner, found)
    return found


ANSWERS = {"answer": 1.0, "vtc": 0.0, "vtm": 0.0, "mlm": 0.0, "mvm": 0.0}


@pytest.mark.parametrize(
    ("fusion", "selector", "score", "objectives"),
    [
        ("cross_attention", "mlp", "cls_attention", {}),
        ("concat", "transformer", "mean_attention", {}),
        ("multiway", "mlp", "norm", {}),
        ("cross_attention", "transformer", "random", {"mcm_kind": "score"}),
        ("cross_attention", "mlp", "norm", ANSWERS),
        ("multiway", "transformer", "norm", ANSWERS | {"answer_kind": "decoder"}),
        ("concat", "mlp", "norm", ANSWERS | {"answer": 0.0, "label": 1.0}),
    ],
)
def test_softmax_logarithms_and_choices_are_float32(fusion, selector, score, objectives):
    """In the program of all losses, with activations in bfloat16; GELU's slope has an exp."""
    video = dataclasses.replace(
        SMALL.model.video, depth=2, sparsify=SparsifyConfig(0.5, 0.5, stages=(1,), score=score)
    )
    model = small_model(
        dtype="bfloat16",
        video=video,
        selector=FrameSelectorConfig(selector, width=8, depth=1, num_heads=2),
        fusion=FusionConfig(fusion, 1, SamplerConfig(4, 2)),
        num_classes=3,
    )
    model = dataclasses.replace(model, deterministic=False)
    mcm = {"mcm": 0.0 if "vtc" in objectives else 1.0, "mcm_template_ids": (4, -1, -1, -1, -1)}
    mcm |= {"mcm_len": SMALL.model.text.max_len}
    objectives = dataclasses.replace(SMALL.objectives, **mcm, **objectives)
    batch = random_batch(6, frames=4)._replace(
        targets=jnp.ones((6, 3), bool),
        answer_ids=jnp.ones((6, 3), jnp.int32),
        answer_mask=jnp.ones((6, 3), bool),
    )
    plain = dataclasses.replace(model, deterministic=True)
    params = jax.eval_shape(lambda: init_params(plain, batch, objectives))
    rngs = {"noise": KEY, "dropout": KEY}
    run = functools.partial(model.apply, method=compute_losses, rngs=rngs)
    program = jax.make_jaxpr(lambda params: run({"params": params}, batch, KEY, objectives))(params)
    found = primitives(program.jaxpr)
    assert ("dot_general", "bfloat16") in found and ("exp", "float32") in found
    assert not [name for name, dtype in found if name in ISLANDS and dtype == "bfloat16"]


def test_logits_of_bfloat16_words_are_not_rounded():
    """Nor are the sums of the table's gradient."""
    x = jnp.asarray(random(2, 5, 64), jnp.bfloat16)  # of two shards
    tables = jnp.asarray(random(2, 40, 64), jnp.bfloat16).astype(jnp.float32)
    exact = np.einsum("srd,svd->srv", np.asarray(x, np.float64), np.asarray(tables, np.float64))
    logits, vjp = jax.vjp(dot_tables, x, tables)
    np.testing.assert_allclose(logits, exact, rtol=1e-4, atol=1e-4)
    grad = np.float32(jnp.asarray(random(2, 5, 40, seed=1), jnp.bfloat16))
    by_x, by_tables = vjp(jnp.asarray(grad))
    assert (by_x.dtype, by_tables.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = np.einsum("srv,srd->svd", grad, np.float32(x))
    np.testing.assert_allclose(by_tables, wanted, rtol=1e-5, atol=1e-5)
    wanted = np.einsum("srv,svd->srd", grad, tables)
    np.testing.assert_allclose(np.float32(by_x), wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("head", ["predict_words", "match", "classify"])
def test_heads_of_a_bfloat16_model_give_unrounded_logits(head):
    """Nearly no logit is a number that bfloat16 has."""
    model, x = (
        small_model(dtype="bfloat16", num_classes=5),
        jnp.asarray(random(9, 8, 16), "bfloat16"),
    )
    shapes = jax.eval_shape(lambda: model.init(KEY, x, method=head))
    params = randomize(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes["params"]))
    params |= {name: 0 * params[name] for name in params if name == "word_bias"}  # hides rounding
    logits = model.apply({"params": params}, x, method=head)
    assert logits.dtype == jnp.float32
    assert (logits == logits.astype(jnp.bfloat16)).mean() < 0.1


def test_embeddings_of_bfloat16_features_are_not_rounded():
    x, module = jnp.asarray(random(6, 16), "bfloat16"), Projection(8)
    params = module.init(KEY, x)
    found = module.apply(params, x)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, module.apply(params, x.astype(jnp.float32)))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


# --- gradients


def test_a_zero_vector_has_a_finite_gradient():
    x = jnp.asarray(random(3, 4)).at[1].set(0.0)
    np.testing.assert_allclose(safe_norm(x), np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-6)
    gradient = jax.grad(lambda x: safe_norm(x).sum())(x)
    assert not gradient[1].any()
    np.testing.assert_allclose(gradient[0], x[0] / np.linalg.norm(x[0]), rtol=1e-5)
    frames = x[None]
    assert jnp.isfinite(jax.grad(lambda x: (norm_score(x) ** 2).sum())(frames)).all()
    module = Projection(5)
    params = module.init(KEY, x)
    assert jnp.isfinite(jax.grad(lambda x: (module.apply(params, x) ** 3).sum())(x)).all()


def test_a_masked_infinity_has_no_gradient():
    """Of a patch that is not reconstructed, and of a padding row's similarities."""
    mask = jnp.array([[[True, False]]])
    target, predicted = jnp.zeros((1, 1, 2, 3)), jnp.ones((1, 1, 2, 3)).at[0, 0, 1].set(jnp.inf)
    value, gradient = jax.value_and_grad(losses.reconstruction_loss)(predicted, target, mask)
    assert value == 1 and jnp.isfinite(gradient).all() and not gradient[0, 0, 1].any()
    valid, ids = jnp.array([True, True, False]), jnp.arange(3)
    logits = jnp.asarray(random(3, 3))
    broken = logits.at[2].set(jnp.inf).at[:, 2].set(-jnp.inf)
    results = [jax.value_and_grad(losses.contrastive_loss)(x, ids, valid) for x in (logits, broken)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


WORDS = random_batch(4)._replace(
    valid=jnp.array([True, True, True, False]),
    targets=jnp.eye(4, 5, dtype=bool).at[2].set(False),
    answer_ids=jnp.ones((4, 3), jnp.int32),
    answer_mask=jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], bool),
    other_ids=jnp.ones((4, 3, 8), jnp.int32),
    other_mask=jnp.ones((4, 3, 8), bool).at[1, 2].set(False),
)
PAIRS = jnp.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 0]], bool)
MASKED_WORDS = jnp.zeros((4, 8), bool).at[:3, 1].set(True)
# objective -> (method of its logits, their shape, where they count, fields of the config)
LOGITS = {
    "mlm": ("predict_words", (4, 8, 7), MASKED_WORDS, {}),
    "vtm": ("match", (12, 2), PAIRS.ravel(), {}),
    "mcm": ("choose", (4, 1), None, {"mcm_kind": "score"}),
    "answer": ("classify", (4, 5), jnp.array([1, 1, 0, 0], bool), {}),
    "answer by decoder": (
        "decode_answer",
        (4, 2, 7),
        jnp.array([[1, 1], [1, 0], [1, 1], [0, 0]], bool),
        {"answer_kind": "decoder"},
    ),
    "label": ("classify", (4, 5), WORDS.valid, {}),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_that_no_loss_counts_may_be_anything(name):
    """Of tokens that are not masked, of pairs without a negative, of padding: no gradient."""
    method, shape, counts, fields = LOGITS[name]
    config, function = dataclasses.replace(SMALL.objectives, **fields), name.split(" ")[0]
    if name == "mcm":  # one score an option, options next to each other
        shape, counts = (16, 1), jnp.repeat(jnp.array([1, 0, 1, 0], bool), 4)
    masked = losses.MaskedTokens(WORDS.text_ids % 7, MASKED_WORDS)
    fused = FusedPairs(jnp.zeros((4, 3, 8, 16)), PAIRS, jnp.zeros((4, 8, 16)))
    batch = WORDS._replace(text_ids=masked.ids)
    model, text = small_model(), TextFeatures(jnp.zeros((4, 8, 16)), WORDS.text_mask)
    video = VideoFeatures(
        jnp.zeros((4, 2, 3, 16)),
        jnp.zeros((4, 2, 16)),
        (jnp.zeros((4, 2, 3), jnp.int32),),
        jnp.zeros((4, 2, 16), bool),
    )
    features = Features(video, text, masked, text, fused)

    def loss(logits):
        """Runs the objective with these logits in place of those of the model."""
        known = {method: logits, "fuse": jnp.zeros((len(logits), 8, 16)), "encode_text": text}

        def answer(call, args, kwargs, context):
            return known[name] if (name := context.method_name) in known else call(*args, **kwargs)

        def run(model):
            with nn.intercept_methods(answer):
                return FUNCTIONS[function](model, features, Context(batch, KEY, config))

        found = model.apply({}, method=run)
        return found.value, found

    logits, broken = jnp.asarray(random(*shape)), jnp.full(shape, jnp.inf)
    broken = broken.at[..., 1:].set(jnp.nan).at[..., 0].multiply(random(*shape[:-1], seed=1))
    ((value, found), gradient), ((other, _), others) = (
        jax.value_and_grad(loss, has_aux=True)(x)
        for x in (logits, jnp.where(counts[..., None], logits, broken))
    )
    assert value == other and value > 0
    np.testing.assert_array_equal(gradient, others)
    np.testing.assert_array_equal((others != 0).any(axis=-1), counts)
    # Parts of a batch are averaged by what counts in them: tokens, pairs, questions, rows.
    assert found.weight == {"mcm": 2, "answer by decoder": 3}.get(name, counts.sum())
    targets = {
        "mlm": batch.text_ids,
        "vtm": jnp.tile(jnp.array([1, 0, 0]), 4),
        "answer": WORDS.targets.argmax(axis=1),
    }
    if name in targets:
        right = (logits.argmax(axis=-1) == targets[name])[counts]
        assert found.metrics[f"{name}/accuracy"] == pytest.approx(float(right.mean()))
    if name in ("mcm", "answer"):  # of three valid rows two have a question, or an answer
        assert found.metrics[f"{name}/valid_ratio"] == pytest.approx(2 / 3)
        assert found.weights[f"{name}/valid_ratio"] == 3


# --- initial values


@pytest.mark.parametrize(("width", "expected"), [(768, 0.02), (192, 0.04)])
def test_kernels_of_a_block_start_as_those_of_bert(width, expected):
    """N(0, 0.02) at BERT's width, for every kernel, and whatever the width of what is read."""
    config = TextEncoderConfig(width=width, mlp_dim=4 * width, num_heads=4)
    block = bert_block(config, Compute(), "block")
    context = Source(jnp.zeros((1, 2, 384)))
    params = jax.jit(lambda x: block.init(KEY, x, None, context))(jnp.zeros((1, 2, width)))
    kernels = {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree.leaves_with_path(params)
        if "kernel" in jax.tree_util.keystr(path)
    }
    assert len(kernels) == 10
    for name, kernel in kernels.items():
        assert abs(float(kernel.std()) / expected - 1) < 0.02, name
        assert abs(float(kernel.mean())) < expected / 50, name
