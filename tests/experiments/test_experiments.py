"""Every experiment file builds; its model and its step fit together (shapes only, no compile)."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jaxtyping import PyTree

from experiments.benchmarks.cost import one_device
from vlmae.choices import SLOT
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override
from vlmae.example_batch import abstract_batch
from vlmae.objectives import OBJECTIVES
from vlmae.train import make_init, make_step

FILES = sorted((Path(__file__).parents[2] / "experiments").glob("[!_]*.py"))


NUM_CLASSES = 1000  # as many answers or labels as the data might have


def filled(config: ExperimentConfig) -> ExperimentConfig:
    """With what the command line takes from the tokenizer and the classes."""
    slots = config.objectives.mcm_template.count("{}")
    classified = config.data.task in ("questions", "labels")
    return override(
        config,
        {
            "model.text.vocab_size": config.model.text.vocab_size or 30522,
            "model.num_classes": NUM_CLASSES if classified else 0,
            "objectives.mcm_template_ids": (101, 2054, *(SLOT,) * slots, 102),
        },
    )


def step_of(config: ExperimentConfig) -> tuple[Callable, PyTree]:
    """The training step of a config, jitted for one device, and the shapes of its state."""
    state = jax.eval_shape(make_init(config), 0)
    return make_step(config, one_device(), state), state


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_experiment(file):
    module = importlib.import_module(f"experiments.{file.stem}")
    assert f"python experiments/{file.stem}.py" in module.__doc__
    config = filled(module.get_config())
    weights = {name: getattr(config.objectives, name) for name in OBJECTIVES}
    step, state = step_of(config)
    for source in config.data.train:
        batch = abstract_batch(config, source)
        after, metrics = jax.eval_shape(step, state, batch)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert {f"loss/{name}" for name, weight in weights.items() if weight} <= set(metrics)


def test_the_papers_setting_has_the_papers_size():
    """ViT-B/16 is 86 million parameters, BERT-base 110 with its 3 upper layers' cross-attention."""
    from experiments import smaug_pretrain

    config = smaug_pretrain.get_config()
    text = dataclasses.replace(config.model.text, vocab_size=30522)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    params = jax.eval_shape(make_init(config), 0).params

    def millions(*parts: str) -> float:
        return sum(x.size for part in parts for x in jax.tree.leaves(params[part])) / 1e6

    assert millions("video_encoder") == pytest.approx(85.6, abs=0.2)
    assert millions("text_encoder", "fusion") == pytest.approx(108.9 + 3 * 2.36, abs=0.5)
    assert millions("pixel_decoder") == pytest.approx(7.7, abs=0.2)
