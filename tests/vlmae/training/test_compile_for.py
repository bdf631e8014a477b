"""Steps for GPUs that are not here: what is read from their programs, and real ones (`-m aot`)."""

import json
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.benchmarks.cost import FULL, base_config
from vlmae.cli.main import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.parallel.sharding import shapes_by_path
from vlmae.runs.workdir import save_config
from vlmae.training import compile_for as compiling
from vlmae.training.compile_for import Memory, compile_for, with_defaults
from vlmae.training.gpus import (
    GPUS,
    WITHOUT_MEASURING,
    as_on,
    described_devices,
    parse_target,
    rules,
)
from vlmae.training.kernels import Kernel, read_schedule, rounded_scatters
from vlmae.training.step import make_init

TINY = {
    "data.image_size": 32,
    "data.train.0.num_frames": 2,
    "data.text_len": 8,
    "model.text.max_len": 8,  # a gradient of positions that no text has does not cross
    "model.text.vocab_size": 600,
    "model.video.width": 64,
    "model.video.depth": 2,
    "model.video.num_heads": 4,
    "model.video.mlp_dim": 96,
    "model.video.patch_size": 8,
    "model.video.sparsify.stages": (1,),
    "model.text.width": 64,
    "model.text.depth": 1,
    "model.text.num_heads": 4,
    "model.text.mlp_dim": 96,
    "model.fusion.depth": 1,
    "model.pixel_decoder.width": 32,
    "model.pixel_decoder.depth": 1,
    "model.pixel_decoder.num_heads": 2,
}


def tiny(batch_size: int, **changes: object) -> ExperimentConfig:
    config = override(base_config("S", batch_size, "bfloat16"), FULL | TINY)
    return override(config, {name.replace("__", "."): value for name, value in changes.items()})


# --- without JAX's plugin for GPUs


def test_targets():
    assert parse_target("h100")[:2] == (1, 1)
    assert parse_target("8xA100") == (1, 8, GPUS["a100"])
    assert parse_target("64x8xh100")[:2] == (64, 8)
    for wrong in ("h99", "0xh100", "8x", "8xx", "2x2x2xh100"):
        with pytest.raises(ValueError, match="no GPU is called"):
            parse_target(wrong)


def test_a_run_takes_its_share_of_the_memory(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    whole = GPUS["a100"].memory_bytes
    assert parse_target("a100").limit_bytes == int(0.9 * whole)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    assert parse_target("a100").limit_bytes == int(0.95 * whole)


def test_rules_for_cudnn_ask_the_target():
    own = rules.check_compute_capability
    with as_on(parse_target("a100")):
        assert rules.check_compute_capability("8.0")
        assert not rules.check_compute_capability("9.0")
        assert rules.is_cuda_compute_capability_equal("8.0")
    assert rules.check_compute_capability is own


PROGRAM = """\
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%looked_up (p: f32[1000,8], i: s32[4,1]) -> f32[4,8] {
  ROOT %g = f32[4,8]{1,0} gather(%p, %i), offset_dims={1}
}

%body (c: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %c = (s32[], f32[4,8]) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%c), index=1
  %twice = f32[4,8]{1,0} multiply(%x, %x)
  ROOT %out = (s32[], f32[4,8]) tuple(%x, %twice)
}

ENTRY %main (p: f32[1000,8], i: s32[4,1], w: bf16[8,16]) -> f32[4,8] {
  %p = f32[1000,8]{1,0} parameter(0)
  %i = s32[4,1]{1,0} parameter(1)
  %w = bf16[8,16]{1,0} parameter(2)
  %words = f32[4,8]{1,0} fusion(%p, %i), kind=kLoop, calls=%looked_up
  %start = f32[4,8]{1,0} all-reduce-start(%words), to_apply=%add
  %q = bf16[4,8]{1,0} convert(%words)
  %mm = (bf16[4,16]{1,0}, s8[64]{0}) custom-call(%q, %w), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %done = f32[4,8]{1,0} all-reduce-done(%start)
  %init = (s32[], f32[4,8]) tuple(%i, %done)
  %loop = (s32[], f32[4,8]) while(%init), condition=%add, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %sum = f32[4,8]{1,0} all-reduce(%done), to_apply=%add
  ROOT %last = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_kernels_and_collectives_of_a_program():
    gpu = GPUS["h100"]
    found = read_schedule(PROGRAM, gpu)
    by_name = {kernel.name: kernel for kernel in found.kernels}
    assert by_name.keys() == {"words", "q", "mm", "twice"}
    # Of a table no more is counted than what is looked up, and the indices.
    assert by_name["words"] == Kernel("words", "fusion", 128 + 128 + 16, 0, 1)
    assert by_name["mm"].flops == 2 * 4 * 16 * 8
    assert by_name["twice"].times == 5 and by_name["twice"].bytes == 3 * 128
    hidden, shown = found.collectives
    assert (hidden.kind, hidden.bytes, hidden.is_async) == ("all-reduce", 128, True)
    assert hidden.hidden_secs == by_name["q"].secs(gpu) + by_name["mm"].secs(gpu)
    assert (shown.is_async, shown.hidden_secs) == (False, 0)
    assert found.secs(gpu) == sum(kernel.secs(gpu) for kernel in found.kernels)


def test_a_kernel_takes_the_longer_of_its_bytes_and_its_products():
    gpu = GPUS["a100"]
    assert Kernel("", "", int(gpu.bytes_per_sec), 10, 2).secs(gpu) == pytest.approx(2)
    assert Kernel("", "", 10, int(3 * gpu.product_flops), 1).secs(gpu) == pytest.approx(3)


def test_what_the_data_would_decide():
    config = override(
        tiny(4), {"model.text.vocab_size": 0, "objectives.mcm": 1.0, "objectives.mcm_len": 8}
    )
    filled = with_defaults(config)
    assert filled.model.text.vocab_size == 30522
    assert filled.objectives.mcm_template_ids.count(-1) == 4
    assert with_defaults(tiny(4)) == tiny(4)
    open_classes = override(
        config, {"data.task": "labels", "objectives.label": 1.0, "objectives.mcm": 0.0}
    )
    with pytest.raises(ValueError, match=r"--model.num-classes=0 takes the number from the data"):
        with_defaults(open_classes)


def test_the_command_prints_what_is_compiled(tmp_path, monkeypatch, capsys):
    """With a program for the GPU from a file, as nothing can be compiled for one here."""
    target, schedule = parse_target("8xh100"), read_schedule(PROGRAM, GPUS["h100"])
    memory = Memory(2**30, 2**20, 3 * 2**30, 0)
    made = compiling.CompiledFor(target, PROGRAM, memory, 10**12, schedule, 1.0)
    asked = []
    monkeypatch.setattr(compiling, "compile_for", lambda *given: asked.append(given) or made)
    save_config(tiny(16), tmp_path / "config.json")
    with pytest.raises(SystemExit) as end:
        main(["compile", str(tmp_path), "--target", "8xh100", "--program", str(tmp_path / "hlo")])
    assert end.value.code == 0 and asked == [(target, tiny(16))]
    out = capsys.readouterr().out
    assert "8 x NVIDIA H100 80GB HBM3, not run" in out and "| temporary | 3.00 |" in out
    assert "| all-reduce | 2 (1 asynchronous) |" in out and "62.5 GFLOPs a clip" in out
    assert (tmp_path / "hlo").read_text() == PROGRAM


# --- with it


aot = pytest.mark.aot


@pytest.fixture(scope="module")
def compiled():
    """(target, fields) -> the tiny step for it, compiled once."""
    made = {}

    def get(name: str, **changes: object) -> compiling.CompiledFor:
        key = (name, json.dumps(changes))
        if key not in made:
            target = parse_target(name)
            config = tiny(4 * target.nodes * target.gpus, **changes)
            made[key] = compile_for(target, config)
        return made[key]

    try:
        described_devices(parse_target("h100"))
    except ValueError as error:
        pytest.skip(str(error))
    return get


def parameter_shapes(**changes: object) -> set[tuple[int, ...]]:
    params = jax.eval_shape(make_init(tiny(4, **changes)), 0).params
    return {shape for shape in shapes_by_path(params).values() if shape}


@aot
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["h100", "a100", "a6000", "l4"])
def test_a_step_for_one_gpu_attends_by_cudnn(name, compiled):
    found = compiled(name)
    calls = found.schedule.calls()
    # Video, text, fusion (itself and the video) and decoder; each once forward and once backward.
    blocks = 2 + 1 + 2 + 1
    assert calls == {"fmhaSoftmax": blocks, "fmhaSoftmaxBackward": blocks}
    assert found.schedule.collectives == []
    params = jax.eval_shape(make_init(tiny(4)), 0)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert found.memory.state == pytest.approx(held, rel=0.02)  # a little more: alignment
    assert 0 < found.least_secs < 0.1


@aot
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("changes", [{}, {"mesh__fsdp": 8, "mesh__data": 1}], ids=str)
def test_no_gradient_of_a_table_is_scattered_in_bfloat16(changes, compiled):
    found = compiled("8xh100" if changes else "h100", **changes)
    rows = [re.search(r"bf16\[([\d,]*)\]", line)[1] for line in rounded_scatters(found.text)]
    shapes = [tuple(int(x) for x in row.split(",")) for row in rows]
    assert shapes, "hard negatives are still scattered, onto activations"
    tables = parameter_shapes()
    assert not [shape for shape in shapes if shape in tables or shape[1:] in tables]


@aot
def test_before_it_was(compiled):
    """Flax's own lookup, which a text encoder in bfloat16 made."""
    del compiled  # asked for to be skipped with the others
    device = described_devices(parse_target("h100"))[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    embed = nn.Embed(600, 64, dtype=jnp.bfloat16)

    def loss(table, ids):
        x = embed.apply({"params": {"embedding": table}}, ids)
        return (x.astype(jnp.float32) ** 2).sum()

    table = jax.ShapeDtypeStruct((600, 64), jnp.float32, sharding=sharding)
    ids = jax.ShapeDtypeStruct((4, 8), jnp.int32, sharding=sharding)
    program = jax.jit(jax.grad(loss)).lower(table, ids).compile(WITHOUT_MEASURING).as_text()
    assert any("bf16[600,64]" in line for line in rounded_scatters(program))


SMALL_BYTES = 200_000  # embeddings of VTC, lengths, counts, scores, metrics


@aot
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("changes", "large"),
    [
        ({}, {"all-reduce"}),
        ({"mesh__fsdp": 8, "mesh__data": 1}, {"all-gather", "reduce-scatter"}),
        ({"mesh__tensor": 2, "mesh__data": 4}, {"all-reduce"}),
    ],
    ids=["data", "fsdp", "tensor"],
)
def test_collectives_are_those_that_there_must_be(changes, large, compiled):
    """Gradients are summed; `fsdp` gathers matrices; `tensor` sums activations; no more."""
    found = compiled("8xh100", **changes)
    sizes = Counter()
    for collective in found.schedule.collectives:
        # Each device keeps an eighth of what it sums.
        parts = 8 if collective.kind == "reduce-scatter" else 1
        sizes[collective.kind] += parts * collective.bytes
    assert {kind for kind, size in sizes.items() if size > SMALL_BYTES} == large, sizes


@aot
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sums", ["bfloat16", "float32"])
def test_every_gradient_crosses_the_network_once(sums, compiled):
    """That of the word table too, which is read twice; in the type that was asked for."""
    found = compiled("8xh100", **({"model__gradient_dtype": sums} if sums == "float32" else {}))
    moved = sum(x.bytes for x in found.schedule.collectives if x.kind == "all-reduce")
    params = jax.eval_shape(make_init(tiny(4)), 0).params
    width, once = np.dtype(jnp.dtype(sums)).itemsize, 0
    for path, shape in shapes_by_path(params).items():
        is_float32 = len(shape) < 2 or re.search("projection|match_head|score", path)  # heads
        once += math.prod(shape) * (4 if is_float32 else width)
    assert moved == pytest.approx(once, rel=0.05)


@aot
@pytest.mark.timeout(1200)
def test_the_largest_batch_of_a_gpu_that_is_not_here(compiled, capsys):
    del compiled
    from vlmae.training.batch_size import find_batch_size

    found = find_batch_size(tiny(4), memory_gib=0.2, target=parse_target("h100"))
    lines = capsys.readouterr().out.splitlines()
    assert found > 8 and len(lines) <= 5
    assert f"batch size {found}: fits" in "\n".join(lines)
