"""Features that stay where they were made: the division of rows, and copies in host memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.evaluation_processes import largest_difference, run_processes
from vlmae.config.experiment import MeshConfig
from vlmae.evaluation import clip_features
from vlmae.evaluation.clip_features import ClipFeatures, _steps
from vlmae.parallel.sharding import batch_sharding, make_mesh


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_row_is_run_once_by_the_shard_of_its_clip(parts):
    """And rows of one clip are neighbors, so that a clip is read once."""
    rng = np.random.default_rng(parts)
    clip_rows = rng.integers(0, 27, 100)
    done, before = np.zeros(100, int), []
    for batch, within, rows, valid in _steps(ClipFeatures(8, []), clip_rows, parts, 4):
        assert within.shape == rows.shape == valid.shape == (parts, 4 // parts)
        each = 8 // parts
        assert ((within >= 0) & (within < each)).all()
        read = batch * 8 + np.arange(parts)[:, None] * each + within
        np.testing.assert_array_equal(read[valid], clip_rows[rows[valid]])
        np.add.at(done, rows[valid], 1)
        before.append((batch, [x[y].tolist() for x, y in zip(within, valid, strict=True)]))
    assert (done == 1).all()
    for batch in {number for number, _ in before}:
        for shard in range(parts):
            order = [clip for number, clips in before if number == batch for clip in clips[shard]]
            assert order == sorted(order)


@pytest.mark.parametrize("full", [False, True])
def test_features_go_to_the_host_where_devices_fill_up(full, monkeypatch):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tree = {"a": jnp.arange(12.0).reshape(4, 3), "b": jnp.ones((4, 2), jnp.bfloat16)}
    tree = jax.device_put(tree, batch_sharding(mesh))
    copied = []
    monkeypatch.setattr(
        clip_features,
        "device_memory",
        lambda _: [{"bytes_in_use": 9, "bytes_limit": 10 if full else 99}],
    )
    offload = clip_features.offload
    monkeypatch.setattr(clip_features, "offload", lambda x: copied.append(x) or offload(x))
    load = clip_features.keep(tree, mesh)
    assert bool(copied) == full
    jax.tree.map(np.testing.assert_array_equal, load(), tree)
    assert jax.tree.map(lambda x: x.sharding, load()) == jax.tree.map(lambda x: x.sharding, tree)
    assert (load()["a"] is tree["a"]) == (not full)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_divide_the_features_and_agree():
    alone = run_processes(1, clips=70, top_k=2)
    for count in (2, 4):
        several = run_processes(count, clips=70, top_k=2)
        assert largest_difference(several, alone[0]) < 1e-4
        for result in several:
            assert result["features_mib"] == pytest.approx(alone[0]["features_mib"] / count)
            assert result["to_host_mib"] < alone[0]["features_mib"] / 4
