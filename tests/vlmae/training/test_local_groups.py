"""The rows among which `local` draws negatives are fixed when a run begins."""

import dataclasses

import jax
import pytest
import tiny_experiment

from data_pipelines.schema.checks import UserError
from vlmae.config.tree import override
from vlmae.launching.sweep_plan import changed_fields
from vlmae.parallel.sharding import make_mesh
from vlmae.runs.workdir import check_workdir, save_config
from vlmae.training import step, train


@pytest.fixture
def config():
    return tiny_experiment.get_config()


def devices(monkeypatch, count: int) -> None:
    for module in (train, step):
        monkeypatch.setattr(module, "batch_shards", lambda mesh: count)


def groups(config, workdir) -> int:
    return train.with_local_groups(config, workdir).objectives.local_groups


def test_a_run_keeps_its_groups_on_another_number_of_devices(config, tmp_path, monkeypatch):
    devices(monkeypatch, 4)
    begun = train.with_local_groups(config, tmp_path)
    assert begun.objectives.local_groups == 4
    save_config(begun, tmp_path / "config.json")
    devices(monkeypatch, 1)
    assert train.with_local_groups(config, tmp_path) == begun
    check_workdir(begun, tmp_path)
    assert changed_fields(begun, config) == [], "a sweep knows the run as its own"
    assert groups(override(config, {"objectives.local_groups": 2}), tmp_path) == 2


def test_a_run_of_an_older_version_goes_on(config, tmp_path, monkeypatch):
    save_config(config, tmp_path / "config.json")
    devices(monkeypatch, 2)
    assert groups(config, tmp_path) == 2
    check_workdir(train.with_local_groups(config, tmp_path), tmp_path)


def test_the_step_gets_the_groups(config, monkeypatch):
    seen = []

    def stop(model, objectives, shards, parts, scales):
        seen.append(shards)
        raise StopIteration

    monkeypatch.setattr(step, "make_gradients", stop)
    devices(monkeypatch, 4)
    mesh = make_mesh(config.mesh)
    for count in (0, 2):
        changes = {"objectives.local_groups": count, "model.text.vocab_size": 64}
        changed = override(config, changes)
        state = jax.eval_shape(step.make_init(changed), 0)
        shapes = state, step.abstract_batch(changed), step.run_values(changed)
        with pytest.raises(StopIteration):
            step.make_step(changed, mesh, state).trace(*shapes)
    assert seen == [4, 2]


def test_groups_must_divide_the_batch(config):
    data = dataclasses.replace(config.data, batch_size=8)
    config = override(dataclasses.replace(config, data=data), {"objectives.local_groups": 3})
    with pytest.raises(UserError, match=r"data\.batch_size cannot be cut into objectives\.loc"):
        step.make_checked_mesh(config)
    config = override(config, {"objectives.local_groups": 8})
    with pytest.raises(UserError, match="leaves 1 row in each group"):
        step.make_checked_mesh(config)
