"""Steps for GPUs with cuDNN's attention, as far as a machine without one can tell.

They are lowered, which runs JAX's checks of types and shapes, and not compiled.
"""

import re

import pytest
from experiment_files import EXPERIMENTS, filled, step_of
from jax._src.cudnn import fused_attention_stablehlo

from experiments import quickstart
from experiments.benchmarks.sides import VARIANTS, variant_config
from experiments.sweeps import UNPRUNED
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.models import video_language
from vlmae.training.step import abstract_batch

FUSED = {"model.attention": "cudnn", "model.dtype": "bfloat16"}
FORWARD_AND_BACKWARD = {"fmhaSoftmax", "fmhaSoftmaxBackward"}
# Merged tokens have a bias, which cuDNN does not take: only without them is all attention fused.
PLAIN = override(filled(quickstart.get_config()), UNPRUNED)
QUICK = ("quickstart", "smaug/pretrain_stage2", "multi/pretrain")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(video_language, "has_cudnn_attention", lambda _: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def fused_calls(config: ExperimentConfig) -> set[str]:
    """Names of cuDNN's attention calls in a config's step, lowered for CUDA."""
    step, state = step_of(override(config, FUSED))
    lowered = step.trace(state, abstract_batch(config)).lower(lowering_platforms=("cuda",))
    return set(re.findall(r"__cudnn\$(\w+)", lowered.as_text()))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXPERIMENTS],
)
def test_every_experiment_lowers_for_gpus(name, as_on_a_gpu):
    assert fused_calls(filled(EXPERIMENTS[name]())) == FORWARD_AND_BACKWARD


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_so_does_the_benchmark(name, as_on_a_gpu):
    assert fused_calls(variant_config("B", 4, name, 4)) == FORWARD_AND_BACKWARD


def test_every_attention_of_a_step_is_fused(as_on_a_gpu):
    """By how many queries and keys it has; an odd number gets one more."""
    config = override(PLAIN, FUSED)
    step, state = step_of(config)
    lowered = step.trace(state, abstract_batch(config)).lower(lowering_platforms=("cuda",))
    seen, words, patches = 1 + 27, 16, 36  # a quarter of 36 patches is masked
    expected = {(seen, seen), (words, words), (words, 4 * 27), (patches + 2, patches + 2)}
    calls = re.findall(r"__cudnn\$(\w+)\(.* : \((tensor<.*?>), (tensor<.*?>),", lowered.as_text())
    for name in FORWARD_AND_BACKWARD:
        found = {
            tuple(int(x.split("x")[1]) for x in shapes) for call, *shapes in calls if call == name
        }
        assert found == expected


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
    assert fused_calls(override(PLAIN, changes)) == FORWARD_AND_BACKWARD
