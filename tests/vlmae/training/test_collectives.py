"""Bytes of collectives, against programs whose traffic is known."""

import json
import os
import subprocess
import sys

import pytest

from vlmae.training.step_cost import collective_bytes, describe_bytes

# Eight rows of 64 numbers on four devices; what each program must exchange is in its name.
SCRIPT = """
import json
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from vlmae.ops.losses import contrastive_loss, sigmoid_loss, similarity
from vlmae.training.step_cost import collective_bytes

mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
rows, columns, whole = (NamedSharding(mesh, spec) for spec in (P("d"), P(None, "d"), P()))
x = jax.ShapeDtypeStruct((8, 64), "float32")

def count(function, sharding_in, sharding_out, x=x):
    jitted = jax.jit(function, in_shardings=sharding_in, out_shardings=sharding_out)
    return collective_bytes(jitted.lower(x).compile().as_text())

def five_sums(x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c - c.sum(0)), None), x, None, length=5)[0]

def vtc(video, text, ids, valid):
    return contrastive_loss(similarity(video, text), ids, valid)

# 32 clips and texts; no other array has both sides of 32.
inputs = [((32, 1, 24), "float32"), ((32, 24), "float32"), ((32,), "int32"), ((32,), "bool")]
gradients = jax.jit(jax.grad(vtc, (0, 1)), in_shardings=(rows,) * 4, out_shardings=(rows,) * 2)
program = gradients.lower(*(jax.ShapeDtypeStruct(*x) for x in inputs)).compile().as_text()

def siglip(video, text, ids, valid):
    return sigmoid_loss(10 * similarity(video, text) - 10, ids, valid)

# Clips with several texts on other devices, and rows that are not valid.
rng = np.random.default_rng(0)
batch = [rng.normal(size=shape).astype(kind) for shape, kind in inputs[:2]]
batch += [rng.integers(0, 9, 32, np.int32), rng.random(32) < 0.8]
gradients = jax.value_and_grad(siglip, (0, 1))
cut = jax.jit(gradients, in_shardings=(rows,) * 4, out_shardings=(whole, (rows, rows)))
cut = cut.lower(*batch).compile()
pairs = zip(*map(jax.tree.leaves, (cut(*batch), jax.jit(gradients)(*batch))))

print(json.dumps({
    "vtc": collective_bytes(program),
    "vtc_shapes": sorted(set(re.findall(r"f32\\[([\\d,]+)\\]", program))),
    "sigmoid": collective_bytes(cut.as_text()),
    "sigmoid_shapes": sorted(set(re.findall(r"f32\\[([\\d,]+)\\]", cut.as_text()))),
    "sigmoid_errors": [float(abs(a - b).max() / abs(b).max()) for a, b in jax.device_get([*pairs])],
    "nothing": count(lambda x: 2 * x, rows, rows),
    "gather": count(lambda x: x, rows, whole),
    "bytes": count(lambda x: x, rows, whole, jax.ShapeDtypeStruct((8, 64), "uint8")),
    "sum": count(lambda x: x.sum(0), rows, whole),
    "five_sums": count(five_sums, rows, rows),
}))
"""


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothing", {}),
        ("gather", {"all-gather": 8 * 64 * 4}),
        ("bytes", {"all-gather": 8 * 64}),
        ("sum", {"all-reduce": 64 * 4}),
        ("five_sums", {"all-reduce": 5 * 64 * 4}),
    ],
)
def test_programs_of_known_traffic(counted, name, expected):
    assert counted[name] == expected


def test_each_device_computes_its_own_rows_of_the_similarities(counted):
    """An nth of the products; the transposed direction exchanges them, and so does its gradient."""
    assert "8,32" in counted["vtc_shapes"] and "32,32" not in counted["vtc_shapes"]
    assert counted["vtc"]["all-to-all"] == 2 * 8 * 32 * 4


def test_the_sigmoid_loss_is_that_of_one_device_and_needs_no_transposed_similarities(counted):
    assert "8,32" in counted["sigmoid_shapes"] and "32,32" not in counted["sigmoid_shapes"]
    assert "all-to-all" not in counted["sigmoid"]
    assert max(counted["sigmoid_errors"]) < 1e-5


def test_asynchronous_pairs_count_once():
    """As GPUs and TPUs write them: the result stands alone only where the pair ends."""
    program = """HloModule m
%wrapped (p: f32[4]) -> f32[1] {
  ROOT %rs = f32[1]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}
ENTRY %main (p: f32[4]) -> f32[16] {
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  %a = ((f32[4]), f32[1]) async-start(%p), calls=%wrapped
  ROOT %r = f32[16]{0} add(%d, %d)
}
"""
    counts = collective_bytes(program)
    assert counts == {"all-gather": 64, "reduce-scatter": 4}
    assert describe_bytes({"a": 1_000_000, "b": 2_500_000}) == "b 2.5 MB, a 1.0 MB"
