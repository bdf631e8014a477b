"""FLOPs of traced steps against counts by hand, by XLA, and by formulas that were used before."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from experiment_files import EXPERIMENTS, filled
from helpers import SMALL, random_batch
from jax._src.cudnn import fused_attention_stablehlo

from data_pipelines.schema.config import SourceConfig
from data_pipelines.schema.records import Batch
from experiments import quickstart
from experiments.sweeps import UNPRUNED
from vlmae.config.tree import override
from vlmae.models import video_language
from vlmae.models.attention import cudnn_attention
from vlmae.runs.workdir import save_config
from vlmae.training.compiled_step import CompiledStep
from vlmae.training.operations import (
    dense_twin,
    describe_saving,
    flops_per_clip,
    show,
    trace_gradients,
)
from vlmae.training.step_cost import Flops, count_flops, sum_flops


def counted(function, *shapes: tuple[int, ...], dtype: str = "float32") -> Flops:
    """All FLOPs of a function of arrays, of which only the shapes are given."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return sum_flops(count_flops(jax.make_jaxpr(function)(*arrays)))


def gradient(function):
    """The gradients of the sum of squares of a function with respect to all its arguments."""

    def loss(*args) -> jax.Array:
        return jnp.square(function(*args)).sum()

    def run(*args) -> tuple:
        return jax.value_and_grad(loss, argnums=tuple(range(len(args))))(*args)

    return run


# --- by hand


def test_a_dense_layer_and_its_gradients():
    shapes, product = [(4, 7, 3), (3, 5)], 2 * 4 * 7 * 3 * 5
    assert counted(jnp.matmul, *shapes) == Flops(forward=product)
    assert counted(gradient(jnp.matmul), *shapes) == Flops(product, 2 * product)


def test_attention_by_the_sizes_of_its_heads():
    b, q, k, h, e = 2, 6, 10, 3, 4
    shapes, pairs = [(b, q, h, e), (b, k, h, e), (b, k, h, e)], 2 * b * h * q * k * e
    expected = Flops(2 * pairs, 4 * pairs)
    assert counted(gradient(jax.nn.dot_product_attention), *shapes) == expected


def layers(x: jax.Array, kernels: jax.Array) -> jax.Array:
    """A layer for each kernel [l d d], one after the other in a loop."""
    return jax.lax.scan(lambda x, kernel: (jnp.sin(x @ kernel), None), x, kernels)[0]


def test_a_loop_counts_as_often_as_it_runs():
    product = 2 * 8 * 3 * 3
    assert counted(layers, (8, 3), (5, 3, 3)) == Flops(5 * product)
    assert counted(gradient(layers), (8, 3), (5, 3, 3)) == Flops(5 * product, 10 * product)

    def twice(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 2, lambda _, x: layers(x, kernels), x)

    assert counted(twice, (8, 3), (5, 3, 3)) == Flops(2 * 5 * product)


def test_what_is_recomputed_is_told_apart_from_the_backward_pass():
    @jax.checkpoint
    def pair(x: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
        return jnp.sin(x @ down) @ up

    down, up = 2 * 8 * 6 * 3, 2 * 8 * 3 * 5
    shapes = [(8, 6), (6, 3), (3, 5)]
    # The second product is not needed again, since nothing but its result follows.
    expected = Flops(down + up, 2 * (down + up), recomputed=down)
    assert counted(gradient(pair), *shapes) == expected


def test_products_that_no_result_needs_do_not_count():
    def unused(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sin(x) + 0 * jax.lax.stop_gradient((x @ kernel).shape[0])

    assert counted(jax.jit(unused), (8, 3), (3, 3)).total == 0

    def frozen(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return x @ jax.lax.stop_gradient(kernel)

    product = 2 * 8 * 3 * 3
    assert counted(gradient(frozen), (8, 3), (3, 3)) == Flops(product, product)


def test_a_module_that_is_traced_once_counts_for_every_call():
    @nn.jit
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(4)(x)

    model = nn.Sequential([Layer(), Layer(), Layer()])
    variables = model.init(jax.random.key(0), jnp.zeros((8, 4)))
    assert counted(lambda x: model.apply(variables, x), (8, 4)) == Flops(3 * 2 * 8 * 4 * 4)


def test_a_function_with_a_gradient_of_its_own():
    @jax.custom_vjp
    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return x @ kernel

    def backward(kept: tuple, slope: jax.Array) -> tuple:
        return jnp.zeros((8, 3)), kept[0].T @ slope  # one product in place of two

    product.defvjp(lambda *args: (product(*args), args), backward)
    flops = 2 * 8 * 3 * 5
    assert counted(product, (8, 3), (3, 5)) == Flops(flops)
    assert counted(gradient(product), (8, 3), (3, 5)) == Flops(flops, flops)


def test_of_a_conditional_the_dearest_branch_counts():
    def function(x: jax.Array, kernel: jax.Array) -> jax.Array:
        branches = (lambda: x, lambda: x @ kernel @ kernel, lambda: x @ kernel)
        return jax.lax.switch(x[0, 0].astype(int), branches)

    assert counted(function, (8, 3), (3, 3)) == Flops(2 * 2 * 8 * 3 * 3)


def test_a_loop_of_unknown_length_is_warned_of():
    def function(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ kernel, x)

    with pytest.warns(UserWarning, match="while loop"):
        assert counted(function, (8, 3), (3, 3)) == Flops(2 * 8 * 3 * 3)


# --- against XLA


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_as_xla_counts_them(groups):
    def patches(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            images, kernel, (4, 4), "VALID", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    shapes = [(2, 16, 12, 6), (4, 4, 6 // groups, 10)]
    product = 2 * 2 * (4 * 3) * (4 * 4 * 6 // groups) * 10
    assert counted(patches, *shapes) == Flops(product)
    images, kernel = map(jnp.zeros, shapes)
    _, to_images = jax.vjp(lambda x: patches(x, kernel), images)  # dilates what it gets
    _, to_kernel = jax.vjp(lambda x: patches(images, x), kernel)
    for backward in (to_images, to_kernel):
        assert counted(backward, (2, 4, 3, 10)).total == product
        lowered = jax.jit(backward).lower(jnp.zeros((2, 4, 3, 10)))
        assert lowered.cost_analysis()["flops"] == pytest.approx(product, rel=0.01)


def test_xla_counts_little_more_of_a_step():
    """Of a model of realistic width, whose work element by element is small."""
    layer = {"width": 384, "num_heads": 6, "mlp_dim": 1536}
    fields = {
        **{f"model.{part}.{name}": n for part in ("video", "text") for name, n in layer.items()},
        "model.video.patch_size": 16,
        "model.pixel_decoder.width": 192,
        "data.image_size": 112,
        "data.text_len": 32,
        "model.text.max_len": 32,
        "objectives.vtm": 0.0,
        "objectives.mlm": 0.0,
    }
    traced = trace_gradients(override(SMALL, fields), num_frames=4)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in traced.in_avals]
    run = jax.jit(jax.extend.core.jaxpr_as_fun(traced))
    by_xla = run.lower(*shapes).cost_analysis()["flops"]
    assert 1 < by_xla / sum_flops(count_flops(traced)).total < 1.1


# --- cuDNN's attention


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(video_language, "has_cudnn_attention", lambda _: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("queries", [8, 7])
def test_cudnns_attention_counts_like_xlas(queries, as_on_a_gpu):
    """By its shapes, which are even."""
    b, k, h, e = 2, 6, 4, 16
    attend = functools.partial(cudnn_attention, lengths=None)
    shapes = [(b, queries, h, e), (b, k, h, e), (b, k, h, e)]
    even = [(b, 8, h, e), *shapes[1:]]
    fused = counted(gradient(attend), *shapes, dtype="bfloat16")
    plain = counted(gradient(jax.nn.dot_product_attention), *even, dtype="bfloat16")
    assert fused == plain == Flops(2 * 2 * b * 8 * k * h * e, 4 * 2 * b * 8 * k * h * e)
    assert counted(attend, *shapes, dtype="bfloat16") == Flops(plain.forward)
    again = counted(gradient(jax.checkpoint(attend)), *shapes, dtype="bfloat16")
    assert again == plain._replace(recomputed=plain.forward)


# --- against the formulas

REMAT = {"model.remat": "full"}
FUSED = {"model.attention": "cudnn", "model.dtype": "bfloat16"}


def adapted(kind: str) -> dict:
    """One frozen block with an adapter in each of the two encoders."""
    fields = {"kind": kind, "frozen_blocks": 1}
    return {f"model.{p}.adapter.{k}": v for p in ("video", "text") for k, v in fields.items()}


PLAIN = override(quickstart.get_config(), UNPRUNED)
# (config, changes, frames) -> forward, backward, recomputed FLOPs a clip by the formulas of
# revision 7f76145, which counted for every part of the model; vocabulary 30,522 where none is given
FORMULAS = {
    "still": (PLAIN, {}, 1, (152898944, 304802560, 0)),
    "clip": (PLAIN, {}, 4, (264585344, 525189376, 0)),
    "selective": (
        PLAIN,
        {"model.remat": "selective"},
        4,
        (264585344, 525189376, 13272064),
    ),
    "parts": (
        PLAIN,
        {"optim.accumulate_steps": 2},
        4,
        (264585344, 525189376, 126111744),
    ),
    "chunks": (
        PLAIN,
        {"model.video.frames_per_chunk": 2, **REMAT},
        4,
        (264585344, 525189376, 205595648),
    ),
    "inline adapters": (PLAIN, adapted("inline"), 4, (281911424, 395593984, 0)),
    "side adapters": (PLAIN, adapted("side"), 4, (281911424, 395593984, 0)),
    # with a token of padding in the blocks of the pixel decoder, which the formulas had not
    "cudnn": (PLAIN, FUSED, 4, (265120896, 526129408, 0)),
    # without the recipe's temporal layers and with longer texts, as counted then
    "smaug": (
        EXPERIMENTS["smaug/pretrain_stage2"](),
        {"model.video.time_depth": 0},
        4,
        (56206756864, 112092649472, 0),
    ),
    "multi": (
        EXPERIMENTS["multi/pretrain"](),
        {"data.text_len": 40},
        4,
        (235247579648, 469570315264, 0),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_steps_have_the_flops_that_formulas_gave(name, request):
    config, changes, frames, expected = FORMULAS[name]
    config = override(filled(config), changes)
    if config.model.attention == "cudnn":
        request.getfixturevalue("as_on_a_gpu")
    step = sum_flops(count_flops(trace_gradients(config, frames)))
    by_clip = [flops / config.data.batch_size for flops in step]
    assert by_clip == pytest.approx(expected, rel=1e-3)


REMAT_BY_PART = {  # `PLAIN` with `REMAT`, from the same formulas
    "encode_video": (81911808, 159842304, 53157888),
    "temporal": (29589504, 59179008, 21331968),
    "encode_text": (14548992, 29097984, 14548992),
    "fuse": (23543808, 47087616, 23543808),
    "match": (1152, 2304, 0),
    "predict_words": (94058496, 188116992, 0),
    "decode_pixels": (20866048, 41732096, 11101184),
}


def test_so_has_each_part():
    config = override(PLAIN, {"model.text.vocab_size": 30522, **REMAT})
    parts = count_flops(trace_gradients(config, num_frames=4))
    for name, expected in REMAT_BY_PART.items():
        assert tuple(flops / config.data.batch_size for flops in parts[name]) == expected
    assert parts.keys() - REMAT_BY_PART.keys() == {"embed_video", "embed_text", "losses"}


# --- the table

PARTS = (
    *("encode_video", "temporal", "encode_text", "embed_video", "embed_text", "losses"),
    *("frame_selector", "fuse", "match", "predict_words", "decode_pixels"),
)


def test_the_table_of_a_run(tmp_path, capsys):
    changes = {
        **REMAT,
        **dict.fromkeys(("objectives.vtm", "objectives.mlm", "objectives.mvm"), 1.0),
        "model.video.time_depth": 1,
        "model.selector.kind": "mlp",
        "optim.accumulate_steps": 2,
    }
    save_config(override(SMALL, changes), tmp_path / "config.json")
    show(tmp_path)
    frames, table = capsys.readouterr().out.split("A clip of ")[-1].split(" frames:\n\n")
    assert int(frames) == max(source.num_frames for source in SMALL.data.train)
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    figures = {name: [float(cell) for cell in cells] for name, *cells in rows}
    assert figures.keys() == {*PARTS, "first_pass", "total"}
    for forward, backward, recomputed, total in figures.values():
        assert total == pytest.approx(forward + backward + recomputed, abs=0.02)
    *parts, total = figures.values()
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(total, abs=0.1)
    assert figures["first_pass"][:2] == [0, 0]
    for name in ("encode_video", "encode_text", "fuse"):
        forward, backward, recomputed, _ = figures[name]
        assert backward > forward >= recomputed > 0


def test_a_step_is_traced_once_and_its_flops_are_logged(capsys):
    """The count is read from the trace that compiling makes."""
    traces = []

    def step(state: jax.Array, batch: Batch, _: None) -> tuple[jax.Array, dict]:
        traces.append(batch.video.shape)
        rows = batch.video.reshape(len(batch.video), -1) / 255.0
        return state, {"loss/total": (rows @ state).sum()}

    batch = random_batch(size=6)
    width = math.prod(batch.video.shape[1:])
    compiled = CompiledStep(jax.jit(step))
    compiled.compile(jnp.ones((width, 5)), batch)
    _, metrics = compiled(jnp.ones((width, 5)), batch)
    assert traces == [batch.video.shape]
    assert metrics["speed/flops_per_clip"] == 2 * width * 5
    assert f"{2 * width * 5 / 1e9:.2f} GFLOPs a clip" in capsys.readouterr().out


def test_what_a_run_saved_against_its_dense_twin(tiny_config):
    """Twice the clips of stills, as their weight says; nothing is said of a dense run."""
    sources = (SourceConfig(num_frames=2, weight=1.0), SourceConfig(num_frames=1, weight=2.0))
    config = filled(override(tiny_config, {"data.train": sources, "train.steps": 10}))
    dense = dense_twin(config)
    assert dense.model.video.mask.scheme == "none" and not dense.objectives.mvm
    clip, still = (
        sum_flops(count_flops(trace_gradients(dense, frames))).total / 8 for frames in (2, 1)
    )
    assert flops_per_clip(dense) == pytest.approx((clip + 2 * still) / 3)
    total = 10 * 8 * flops_per_clip(dense)
    line = describe_saving(config, total / 3)
    assert f"{total / 1e12:.2f}, 3.0 times that" in line
    assert describe_saving(dense, total) == describe_saving(config, float("nan")) == ""
