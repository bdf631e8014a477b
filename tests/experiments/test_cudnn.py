"""Steps for GPUs with cuDNN's attention, as far as a machine without one can tell.

They are lowered, which runs JAX's checks of types and shapes, and not compiled.
"""

import importlib
import re
from collections import Counter

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from test_experiments import FILES, filled

from experiments import quickstart
from experiments.benchmarks.sides import VARIANTS, variant_config
from vlmae.config import ExperimentConfig, MeshConfig
from vlmae.config_tree import override
from vlmae.example_batch import abstract_batch
from vlmae.sharding import make_mesh
from vlmae.train import make_init, make_step

FUSED = {"model.attention": "cudnn", "model.dtype": "bfloat16"}
QUICK = ("quickstart", "smaug_pretrain_stage2", "multi_pretrain")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def fused_calls(config: ExperimentConfig) -> Counter:
    """How often a config's step, lowered for CUDA, calls which of cuDNN's attentions."""
    state = jax.eval_shape(make_init(config), 0)
    step = make_step(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), state)
    traced = step.trace(state, abstract_batch(config))
    return Counter(
        re.findall(r"__cudnn\$(\w+)", traced.lower(lowering_platforms=("cuda",)).as_text())
    )


def params(files):
    return [
        pytest.param(x, id=x.stem, marks=() if x.stem in QUICK else pytest.mark.slow) for x in files
    ]


@pytest.mark.parametrize("file", params(FILES))
def test_every_experiment_lowers_for_gpus(file, as_on_a_gpu):
    module = importlib.import_module(f"experiments.{file.stem}")
    calls = fused_calls(override(filled(module.get_config()), FUSED))
    assert set(calls) == {"fmhaSoftmax", "fmhaSoftmaxBackward"}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_so_does_the_benchmark(name, as_on_a_gpu):
    config = override(variant_config("B", 4, name, 4), FUSED)
    assert set(fused_calls(config)) == {"fmhaSoftmax", "fmhaSoftmaxBackward"}


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.accumulate_steps": 2},
        {"model.remat": "selective"},
        {"model.remat": "full", "model.video.frames_per_chunk": 2},
        {"model.fusion.kind": "concat", "model.video.time_depth": 1},
        {"model.video.adapter.frozen_blocks": 1, "model.text.adapter.frozen_blocks": 1},
    ],
    ids=str,
)
def test_so_does_what_changes_how_gradients_are_computed(changes, as_on_a_gpu):
    config = override(filled(quickstart.get_config()), FUSED | changes)
    assert set(fused_calls(config)) == {"fmhaSoftmax", "fmhaSoftmaxBackward"}
