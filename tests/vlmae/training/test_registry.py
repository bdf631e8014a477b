"""Objectives as a registry: nothing is forgotten, and a new one needs a function and a line."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import SMALL, random_batch, small_model

from vlmae.config.experiment import ObjectivesConfig
from vlmae.config.objectives import HEADS, OBJECTIVES, Objective, objectives_with
from vlmae.evaluation.evaluators import EVALUATORS, chosen_evaluators
from vlmae.export.model_card import CALLS
from vlmae.runs.metric_registry import metric_of
from vlmae.training import objectives
from vlmae.training.features import Loss, keys_of
from vlmae.weights.export_format import _USES

KEY, MODEL = jax.random.key(3), small_model()


def test_every_objective_has_a_function_and_a_weight():
    assert list(objectives.FUNCTIONS) == list(OBJECTIVES)  # in one order, that of the keys
    assert set(OBJECTIVES) <= {field.name for field in dataclasses.fields(ObjectivesConfig)}


def test_every_evaluator_measures_an_objective_and_all_that_objectives_name_exist():
    assert {name for x in OBJECTIVES.values() for name in x.evaluators} == set(EVALUATORS)
    assert objectives_with("evaluators", "multiple_choice") == ["vtm", "mcm"]


def test_exports_know_every_head():
    assert set(HEADS) == set(CALLS)
    assert set(HEADS) <= set(_USES)


def test_a_config_chooses_the_evaluators_of_its_objectives():
    def chosen(**changes) -> list[str]:
        config = dataclasses.replace(SMALL, objectives=ObjectivesConfig(**changes))
        return list(chosen_evaluators(config))

    assert chosen() == ["retrieval"]  # multiple choice only where the config asks for it
    assert chosen(vtc=0.0) == []
    asked = dataclasses.replace(SMALL.evaluation, choices=4)
    assert list(chosen_evaluators(dataclasses.replace(SMALL, evaluation=asked))) == [
        "retrieval",
        "multiple_choice",
    ]


@dataclasses.dataclass(frozen=True)
class WithBrightness(ObjectivesConfig):
    """The weights, and that of a new objective."""

    brightness: float = 0.0


def brightness(model, features, context) -> Loss:
    """Mean squared prediction of the frames' brightness by the first embedding dimension."""
    target = context.batch.video.mean(axis=(2, 3, 4)) / 255
    return Loss(jnp.square(model.embed_video(features.video)[..., 0] - target).mean(), {})


def losses_of(config: ObjectivesConfig) -> set[str]:
    """Names of the losses of a step, from shapes alone."""

    def run(model, batch):
        return objectives.compute_losses(model, batch, KEY, config).metrics

    def step(batch):
        return MODEL.init_with_output(KEY, batch, method=run)[0]

    return {name for name in jax.eval_shape(step, random_batch()) if name.startswith("loss/")}


def test_a_new_objective_is_a_function_and_a_line(monkeypatch):
    before = {name: jax.random.key_data(key) for name, key in keys_of(KEY).items()}
    monkeypatch.setitem(OBJECTIVES, "brightness", Objective())
    monkeypatch.setitem(objectives.FUNCTIONS, "brightness", brightness)
    trained = losses_of(WithBrightness(vtm=0.0, mlm=0.0, mvm=0.0, brightness=0.5))
    assert trained == {"loss/vtc", "loss/brightness", "loss/total"}
    assert all(metric_of(name).better == "lower" for name in trained)
    after = {name: jax.random.key_data(key) for name, key in keys_of(KEY).items()}
    assert all((after[name] == key).all() for name, key in before.items()), "others draw the same"


def test_a_forgotten_weight_function_or_evaluator_is_an_error(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "brightness", Objective(evaluators=("photometry",)))
    with pytest.raises(AttributeError, match="brightness"):
        ObjectivesConfig()
    config = WithBrightness(vtm=0.0, mlm=0.0, mvm=0.0, brightness=0.5)
    with pytest.raises(ValueError, match=r"objective function .brightness."):
        losses_of(config)
    with pytest.raises(ValueError, match=r"evaluator .photometry."):
        chosen_evaluators(dataclasses.replace(SMALL, objectives=config))
