"""Any mesh computes what one device computes, and really cuts what it says it cuts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import sharding_script
from jax.sharding import PartitionSpec as P

from vlmae.config.experiment import MeshConfig
from vlmae.parallel.sharding import make_mesh, partition

MESHES = ["data", "fsdp", "mixed"]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def on_meshes(tiny_data_dir, tmp_path_factory) -> Path:
    """The folder in which `sharding_script` has left its results."""
    workdir = tmp_path_factory.mktemp("meshes")
    # NPROC: on few cores, simulated devices wait for each other forever without more threads.
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "16",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, sharding_script.__file__, str(tiny_data_dir), str(workdir)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr[-4000:]
    return workdir


@pytest.fixture(scope="session")
def results(on_meshes) -> dict:
    return json.loads((on_meshes / "results.json").read_text())


@pytest.mark.parametrize("mesh", [*MESHES, "multi_mixed"])
def test_losses_of_every_step(results, mesh):
    """With all objectives, hard negatives from the global batch, and dropout."""
    multi = mesh.startswith("multi")
    expected = results["multi_single" if multi else "single"]["history"]
    assert {"loss/vtc", "loss/vtm", "loss/mlm", "loss/mvm"} <= expected[0].keys()
    assert ("loss/mcm" in expected[0]) == multi
    assert len({step["loss/total"] for step in expected}) == sharding_script.STEPS
    for step, (ours, theirs) in enumerate(zip(results[mesh]["history"], expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)


def test_the_local_scopes_are_the_rows_of_a_device(results):
    """Eight devices of two rows compute what one device computes in eight shards."""
    devices, shards, whole = (results["scopes"][name] for name in ("devices", "shards", "whole"))
    for name, value in shards.items():
        assert devices[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name in ("loss/vtc", "loss/vtm"):
        assert whole[name] != pytest.approx(shards[name], rel=1e-4), name


def test_groups_are_the_same_on_any_number_of_devices(results):
    """A run that began on two devices learns the same on one and on eight."""
    one, eight = (results["scopes"][f"two_groups{where}"] for where in ("", "_on_devices"))
    for name, value in one.items():
        assert eight[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert one["loss/vtm"] != pytest.approx(results["scopes"]["shards"]["loss/vtm"], rel=1e-4)


def test_two_devices_compute_two_parts_like_one_device(results, on_meshes):
    """With local scopes, so that each part and each shard of it must have its own rows."""
    ours, theirs = (results["accumulated"][name] for name in ("cut", "single"))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert ours["loss/vtc"] > 0
    cut, single = (np.load(on_meshes / f"accumulated_{name}.npz") for name in ("cut", "single"))
    assert sorted(cut) == sorted(single)
    for name in single:
        np.testing.assert_allclose(cut[name], single[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_batch_is_cut_by_data_and_fsdp(results):
    assert results["batch_shards"] == {"data": 8, "fsdp": 8, "mixed": 4}


@pytest.mark.parametrize("mesh", MESHES)
def test_final_parameters(on_meshes, mesh):
    """All but the biases of keys: softmax cancels them, so their gradient is rounding alone."""
    ours, theirs = (np.load(on_meshes / name / "params.npz") for name in (mesh, "single"))
    assert sorted(ours) == sorted(theirs)
    for name in theirs:
        if not name.endswith("/key/bias"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=2e-6, err_msg=name)


MLP = "video_encoder/block_0/mlp/up/kernel"
QUERY = "text_encoder/block_0/attention/query/kernel"
OUT = "fusion/block_0/cross_attention/out/kernel"
SHARED = "fusion/shared_attention_0/out/kernel"
WORDS = "text_encoder/embeddings/word/embedding"


@pytest.mark.parametrize(
    ("mesh", "name", "shape"),
    [
        ("single", MLP, [16, 32]),
        ("data", MLP, [16, 32]),
        ("fsdp", MLP, [16, 4]),
        ("mixed", MLP, [8, 16]),
        ("fsdp", QUERY, [2, 16]),
        ("mixed", QUERY, [8, 8]),
        ("mixed", OUT, [8, 8]),
        ("fsdp", WORDS, [166, 2]),
        ("mixed", WORDS, [83, 16]),
        ("multi_mixed", SHARED, [8, 8]),
    ],
)
def test_parameters_and_moments_are_cut(results, mesh, name, shape):
    held = {key: value for key, value in results[mesh]["shards"].items() if key.endswith(name)}
    assert len(held) == 3, "the parameter and Adam's two moments"
    assert all(value == shape for value in held.values()), held


def test_parameters_cross_the_network_and_not_activations(results):
    """With `fsdp`: a row more costs less than its text's tokens twice, for the words' gradients."""
    few, many = results["network"]["16"], results["network"]["64"]
    tokens, width = 16, 16
    assert few < 3 * results["parameter_bytes"]
    assert many - few < 48 * 2 * tokens * width * 4


@pytest.mark.parametrize("mesh", ["mixed", "restored"])
def test_retrieval(results, mesh):
    """VTC over all pairs, VTM over the three best; also restored and evaluated on data=8."""
    ours = results[mesh] if mesh == "restored" else results[mesh]["retrieval"]
    ours = {name.removeprefix("retrieval/"): value for name, value in ours.items()}
    assert ours["num_clips"] == 12
    theirs = results["single"]["retrieval"]
    assert ours.keys() == theirs.keys()
    # Embeddings of another mesh differ by rounding, which InfoNCE shows. Its temperature is not
    # compared: a model that has learned next to nothing fits any high one equally well.
    compared = [name for name in ours if not name.endswith("temperature")]
    assert {name: ours[name] for name in compared} == pytest.approx(
        {name: theirs[name] for name in compared}, rel=1e-4
    )


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "expected"),
    [
        # tensor: heads lie side by side in the projections' output; the network's hidden width
        ("a/attention/query/kernel", (8, 12), (1, 1, 2), P(None, "tensor")),
        ("a/cross_attention/value/bias", (12,), (1, 1, 2), P("tensor")),
        ("a/attention/out/kernel", (12, 8), (1, 1, 2), P("tensor", None)),
        ("a/attention/out/bias", (8,), (1, 1, 2), P(None)),
        ("a/mlp/up/kernel", (8, 32), (1, 1, 4), P(None, "tensor")),
        ("a/mlp/down/kernel", (32, 8), (1, 1, 4), P("tensor", None)),
        ("opt_state/1/0/mu/a/mlp/down/kernel", (32, 8), (1, 1, 4), P("tensor", None)),
        ("a/mlp/down/bias", (8,), (1, 1, 4), P(None)),
        ("patch_embed/kernel", (12, 8), (1, 1, 2), P(None, None)),
        # a dimension that the axis does not divide stays whole
        ("a/mlp/up/kernel", (8, 30), (1, 1, 4), P(None, None)),
        # fsdp: the largest dimension that is free and divisible
        ("a/mlp/up/kernel", (8, 32), (1, 4, 1), P(None, "fsdp")),
        ("a/mlp/up/kernel", (8, 32), (1, 4, 2), P("fsdp", "tensor")),
        ("a/attention/query/kernel", (6, 12), (1, 4, 2), P(None, "tensor")),
        ("word/embedding", (31, 8), (1, 4, 2), P(None, "fsdp")),
        ("cls", (7,), (1, 4, 1), P(None)),
        # fsdp leaves alone what the optimizer joins
        ("a/mlp/up/bias", (32,), (1, 4, 2), P("tensor")),
        ("a/mlp/up/bias", (32,), (1, 4, 1), P(None)),
        ("positions", (16, 8), (1, 4, 1), P(None, None)),
        ("step", (), (1, 4, 2), P()),
        # data never cuts a parameter
        ("a/mlp/up/kernel", (8, 32), (4, 1, 1), P(None, None)),
    ],
)
def test_partition(name, shape, sizes, expected):
    assert partition(name, shape, dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))) == (
        expected
    )


def test_mesh_takes_the_rest_of_the_devices():
    mesh = make_mesh(MeshConfig(data=-1), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 2}, {"data": -1, "tensor": 2}])
def test_mesh_that_does_not_fit(sizes):
    with pytest.raises(ValueError, match=r"mesh data=.* does not fit 1 device\(s\)"):
        make_mesh(MeshConfig(**sizes), jax.devices()[:1])


@pytest.mark.parametrize("sizes", [{"data": 0}, {"fsdp": -2}, {"data": -1, "fsdp": -1}])
def test_mesh_sizes_out_of_range(sizes):
    with pytest.raises(ValueError, match=r"--data=.* --fsdp=.* --tensor="):
        MeshConfig(**sizes)


def test_batch_that_the_mesh_does_not_divide(results):
    problem = "is not divisible by the mesh: data=2 x fsdp=4 = 8"
    assert results["errors"]["batch"] == f"data.batch_size=12 {problem}"
    assert results["errors"]["eval_batch"] == f"data.eval_batch_size=12 {problem}"
    assert results["errors"]["part"] == f"data.batch_size / optim.accumulate_steps=4=4 {problem}"


def test_one_row_on_a_device_has_no_local_negatives(results):
    problem = (
        "leaves 1 row on each device, so objectives.vtm_scope=local finds no negatives: "
        "use a larger batch or objectives.vtm_scope=global"
    )
    assert results["errors"]["one_row"] == f"data.batch_size {problem}"
    part = "data.batch_size / optim.accumulate_steps=2"
    assert results["errors"]["one_row_of_a_part"] == f"{part} {problem}"
    assert "one_row_global" not in results["errors"]


def test_heads_that_the_mesh_does_not_divide(results):
    expected = "model.video.num_heads=2 is not divisible by mesh.tensor=4"
    assert results["errors"]["heads"] == expected
