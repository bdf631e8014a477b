"""Attention by cuDNN's kernel equals that by XLA's, for any number of tokens."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize
from jax import export
from jaxtyping import PyTree

from vlmae.config.tree import override
from vlmae.export.programs import bound, programs
from vlmae.models import video_language
from vlmae.models.attention import Attention
from vlmae.models.layers import Compute
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.ops.masking import PatchMask
from vlmae.training.objectives import compute_losses
from vlmae.training.step import make_checked_mesh
from vlmae.weights.export_format import exported_of, parameter_shapes

FUSED = {"model.attention": "cudnn", "model.dtype": "bfloat16"}


@pytest.fixture
def fused_calls(monkeypatch):
    """Records calls of the fused kernel, replaced by one that takes only what JAX admits."""
    attend, calls = jax.nn.dot_product_attention, []

    def stand_in(query, key, value, *, implementation, bias=None, mask=None, **lengths):
        if implementation == "cudnn":
            assert bias is None and mask is None
            assert query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
            calls.append((query.shape[1], key.shape[1]))
        return attend(query, key, value, bias=bias, mask=mask, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return calls


def outputs_and_gradients(implementation: str, x: jax.Array, context: jax.Array, **options):
    attention = Attention(num_heads=2, compute=Compute(str(x.dtype), implementation))
    params = attention.init(jax.random.key(0), x, context, **options)

    def loss(params, x, context):
        out = attention.apply(params, x, context, **options).tokens
        weights = np.random.default_rng(1).normal(size=out.shape)
        return (out * weights).sum(), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x, context)


def both_kernels(queries: int, keys: int, with_lengths: bool, width: int, dtype: str) -> tuple:
    """Computes outputs and gradients by XLA and by cuDNN from the same noise."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, queries, width)), dtype)
    context = jnp.asarray(rng.normal(size=(3, keys, width)), dtype)
    lengths = jnp.array([1, keys, 3], jnp.int32) if with_lengths else None
    run = functools.partial(outputs_and_gradients, x=x, context=context, lengths=lengths)
    return run("xla"), run("cudnn")


def assert_close(found: PyTree, wanted: PyTree, tolerance: float) -> None:
    """Checks differences relative to the largest value of each array."""
    wanted = dict(jax.tree_util.tree_leaves_with_path(wanted))
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        name = jax.tree_util.keystr(path)
        if "key" in name and "bias" in name:  # moves all logits alike: its gradient is zero
            continue
        leaf, other = np.float32(leaf), np.float32(wanted[path])
        assert np.abs(leaf - other).max() <= tolerance * np.abs(other).max(), name


lengths_of_texts = pytest.mark.parametrize("with_lengths", [False, True])


@lengths_of_texts
@pytest.mark.parametrize("queries", [4, 5])
@pytest.mark.parametrize("keys", [6, 7])
def test_fused_attention_is_the_plain_one(queries, keys, with_lengths, fused_calls):
    plain, fused = both_kernels(queries, keys, with_lengths, width=8, dtype="float32")
    assert set(fused_calls) == {(queries + queries % 2, keys + keys % 2)}
    assert_close(fused, plain, tolerance=1e-6)


@pytest.fixture
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@lengths_of_texts
@pytest.mark.parametrize("queries", [32, 197])
@pytest.mark.parametrize("keys", [40, 197])
def test_cudnn_attends_as_xla_does(queries, keys, with_lengths):
    """XLA's own in bfloat16 differ from float32 by up to 2.3 % (biases; on a CPU)."""
    plain, fused = both_kernels(queries, keys, with_lengths, width=128, dtype="bfloat16")
    assert_close(fused, plain, tolerance=5e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_cudnn_gives_a_model_the_same_losses():
    batch = random_batch()
    params = randomize(init_params(build_model(SMALL), batch))

    def losses(attention: str) -> dict:
        def run(model, batch):
            return compute_losses(model, batch, jax.random.key(0), SMALL.objectives).metrics

        model = build_model(override(SMALL, FUSED | {"model.attention": attention}))
        apply = jax.jit(functools.partial(model.apply, method=run))
        return apply({"params": params}, batch)

    plain, fused = losses("xla"), losses("cudnn")
    for name in ("vtc", "vtm", "mlm", "mvm"):
        assert_close(fused[f"loss/{name}"], plain[f"loss/{name}"], tolerance=2e-2)


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_masks_and_biases_are_for_the_plain_kernel(name, fused_calls):
    given = jnp.tri(4, dtype=bool)[None] if name == "mask" else jnp.tri(4)[None, None]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 8)), jnp.float32)
    plain, fused = (outputs_and_gradients(kind, x, x, **{name: given}) for kind in ("xla", "cudnn"))
    assert not fused_calls
    jax.tree.map(np.testing.assert_array_equal, fused, plain)


def test_without_a_gpu_a_run_is_read_and_not_trained():
    config = override(SMALL, FUSED)
    assert build_model(config).config.attention == "xla"
    with pytest.raises(ValueError, match=r"attention=cudnn needs a GPU .*, but jax finds cpu dev"):
        make_checked_mesh(config)


class Device(NamedTuple):
    """As JAX describes one."""

    platform: str
    compute_capability: str = ""


@pytest.mark.parametrize(
    ("device", "changes", "kernel"),
    [
        (Device("gpu", "9.0"), {}, "cudnn"),
        (Device("cuda", "8.6"), {}, "cudnn"),  # of a described one
        (Device("gpu", "7.5"), {}, "xla"),
        (Device("gpu", "gfx942"), {}, "xla"),
        (Device("cpu"), {}, "xla"),
        (Device("gpu", "9.0"), {"model.attention": "xla"}, "xla"),
        (Device("gpu", "9.0"), {"model.dtype": "float32"}, "xla"),
        (Device("gpu", "9.0"), {"model.text.num_heads": 4}, "xla"),  # heads of four
    ],
    ids=str,
)
def test_auto_takes_cudnn_where_it_can(device, changes, kernel):
    config = override(SMALL, {"model.attention": "auto", "model.dtype": "bfloat16", **changes})
    assert build_model(config, device=device).config.attention == kernel


@pytest.mark.parametrize("count", [5, 6])
def test_padding_tokens_change_no_features(count, fused_calls, monkeypatch):
    """One for a whole encoder, before its first block; pruning and adapters see none."""
    changes = {"model.video.sparsify.keep_rate": 0.7, "model.video.sparsify.eval_keep_rate": 0.7}
    changes |= {"model.video.sparsify.stages": (1,), "model.video.depth": 3}
    changes |= {"model.video.adapter.frozen_blocks": 1, "model.video.adapter.num_heads": 2}
    config = override(SMALL, changes)
    batch = random_batch()
    params = randomize(init_params(build_model(config), batch))
    kept = jnp.broadcast_to(jnp.arange(count), (*batch.video.shape[:2], count))
    mask = PatchMask(kept, jnp.zeros((*kept.shape[:2], 16), bool))

    def features(kernel: str) -> tuple:
        monkeypatch.setattr(video_language, "resolve_attention", lambda *_: kernel)

        def run(model):
            video = model.encode_video(batch.video, mask)
            return video.tokens, model.decode_pixels(video).pixels

        def loss(params):
            outputs = model.apply({"params": params}, method=run)
            return sum((x**2).sum() for x in outputs), outputs

        model = VideoLanguageModel(config.model, config.data.image_size)
        return jax.jit(jax.grad(loss, has_aux=True))(params)

    plain, fused = features("xla"), features("cudnn")
    assert fused_calls
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), plain, fused)


def test_an_export_of_such_a_run_is_read_without_a_gpu():
    params = init_params(build_model(SMALL), random_batch())
    plain, fused = (exported_of(x, params, 0) for x in (SMALL, override(SMALL, FUSED)))
    assert fused.model.attention == "cudnn"
    assert parameter_shapes(fused) == parameter_shapes(plain)


def test_what_is_exported_runs_on_other_devices(monkeypatch):
    params = init_params(build_model(SMALL), random_batch())
    config = override(SMALL, FUSED)
    monkeypatch.setattr(video_language, "has_cudnn_attention", lambda _: True)
    assert build_model(config).config.attention == "cudnn"
    for program in programs(config, params).values():
        run = jax.jit(bound(config, params, program.method))
        lowered = export.export(run, platforms=("cpu", "cuda"))(program.inputs)
        assert "cudnn" not in lowered.mlir_module()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.dtype": "float32"}, "--model.dtype=bfloat16, not float32"),
        ({"model.text.num_heads": 4}, "not 4: change --model.text.width"),
        ({"model.pixel_decoder.width": 136 * 2}, "not 136: change --model.pixel-decoder.width"),
        (
            {"model.video.adapter.frozen_blocks": 1, "model.video.adapter.num_heads": 8},
            "not 12: change --model.video.adapter.width",
        ),
    ],
)
def test_what_the_fused_kernel_does_not_take(changes, message):
    with pytest.raises(ValueError, match=message):
        override(SMALL, FUSED | changes)
