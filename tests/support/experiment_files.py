"""All experiments, and the training step of a config, as shapes."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from jaxtyping import PyTree

from experiments.benchmarks.cost import one_device
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.ops.multiple_choice import SLOT
from vlmae.training.step import make_init, make_step, run_values

GetConfig = Callable[[], ExperimentConfig]
ROOT = Path(__file__).parents[2]
SHARED = ("__init__", "recipes", "sweeps")  # no experiments themselves


def find_experiments() -> dict[str, GetConfig]:
    """All experiments by file and variant: "smaug/pretrain", "smaug/retrieval msrvtt"."""
    found = {}
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        if path.stem in SHARED or "benchmarks" in path.parts:
            continue
        name = path.relative_to(ROOT / "experiments").with_suffix("").as_posix()
        module = importlib.import_module(f"experiments.{name.replace('/', '.')}")
        if hasattr(module, "VARIANTS"):
            variants = module.VARIANTS.items()
            found |= {f"{name} {variant}".rstrip(): get for variant, get in variants}
        else:
            found[name] = module.get_config
    return found


def docs_of(get_config: GetConfig) -> str:
    """The docstrings of an experiment's file and of its config."""
    return f"{sys.modules[get_config.__module__].__doc__}\n{get_config.__doc__}"


EXPERIMENTS = find_experiments()
NUM_CLASSES = 1000  # as many answers or labels as the data might have


def filled(config: ExperimentConfig) -> ExperimentConfig:
    """With what the command line takes from the tokenizer and the classes."""
    slots = config.objectives.mcm_template.count("{}")
    classified = config.data.task in ("questions", "labels")
    return override(
        config,
        {
            "model.text.vocab_size": config.model.text.vocab_size or 30522,
            "data.text_len": config.data.text_len or config.model.text.max_len,
            "model.num_classes": NUM_CLASSES if classified else 0,
            "objectives.mcm_template_ids": (101, 2054, *(SLOT,) * slots, 102),
        },
    )


def step_of(config: ExperimentConfig) -> tuple[Callable, PyTree]:
    """The training step of a config as (state, batch), for one device, and its state's shapes."""
    state = jax.eval_shape(make_init(config), 0)
    step, values = make_step(config, one_device(), state), run_values(config)
    return jax.jit(lambda state, batch: step(state, batch, values)), state
