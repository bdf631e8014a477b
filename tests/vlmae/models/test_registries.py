"""Every kind that the config names is implemented in JAX and in PyTorch, and no other."""

from typing import get_args, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_model
from oracles import random

from vlmae.config import model as config
from vlmae.config.experiment import EvaluationConfig, ObjectivesConfig
from vlmae.export import modeling_vlmae as exported
from vlmae.models import (
    adapter,
    attention,
    blocks,
    embeddings,
    frame_selector,
    fusion,
    multiway,
    scoring,
    temporal,
    text_encoder,
    video_encoder,
)
from vlmae.models.attention import Source
from vlmae.models.layers import Compute
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.ops import masking, token_pruning
from vlmae.ops.registry import Registry
from vlmae.training import pairs

# Field of a config, its registry, and that of the exported model, which has those of evaluation.
KINDS = [
    (config.MaskConfig, "scheme", masking.SCHEMES, None),
    (config.SparsifyConfig, "score", blocks.SCORES, exported.SCORES),
    (config.SparsifyConfig, "rest", token_pruning.RESTS, exported.RESTS),
    (config.AdapterConfig, "kind", adapter.ADAPTERS, exported.ADAPTERS),
    (config.VitLayout, "activation", blocks.ACTIVATIONS, exported.ACTIVATIONS),
    (config.VitLayout, "frame_cls", video_encoder.FRAME_VECTORS, exported.FRAME_VECTORS),
    (config.VitLayout, "relative_bias", embeddings.TABLES, exported.TABLES),
    (config.VideoEncoderConfig, "positions", video_encoder.POSITIONS, exported.POSITIONS),
    (config.VideoEncoderConfig, "time_init", temporal.TIME_INITS, None),
    (config.TextEncoderConfig, "pooling", text_encoder.TEXT_POOLINGS, exported.TEXT_POOLINGS),
    (config.FrameSelectorConfig, "kind", frame_selector.SELECTORS, exported.SELECTORS),
    (config.SamplerConfig, "pooling", multiway.POOLINGS, exported.POOLINGS),
    (config.SamplerConfig, "guidance", multiway.GUIDANCES, exported.GUIDANCES),
    (config.FusionConfig, "kind", fusion.FUSIONS, exported.FUSIONS),
    (config.ModelConfig, "attention", attention.KERNELS, None),
    (config.ModelConfig, "remat", blocks.REMATS, None),
    (ObjectivesConfig, "mcm_kind", scoring.CHOICES, None),
    (ObjectivesConfig, "vtc_loss", pairs.VTC_LOSSES, None),
    (EvaluationConfig, "frame_ensemble", scoring.ENSEMBLES, None),
]
NAMES = [f"{owner.__name__}.{field}" for owner, field, *_ in KINDS]


@pytest.mark.parametrize(("owner", "field", "registry", "in_torch"), KINDS, ids=NAMES)
def test_config_and_registries_name_the_same_kinds(owner, field, registry, in_torch):
    """Names without a registry: "none" may leave the part out, "auto" is resolved before, and
    "merge" has gone another way.
    """
    named = set(get_args(get_type_hints(owner)[field])) - {"auto", "merge"}
    assert registry.keys() | {"none"} == named | {"none"} and registry.keys() <= named
    assert in_torch is None or in_torch.keys() == registry.keys()


def test_every_registry_is_held_by_a_field_of_a_config():
    modules = [masking, token_pruning, adapter, attention, blocks, embeddings, frame_selector]
    modules += [fusion, multiway, scoring, temporal, text_encoder, video_encoder, pairs]
    found = [x for m in modules for x in vars(m).values() if isinstance(x, Registry)]
    held = [registry for _, _, registry, _ in KINDS]
    assert {id(x) for x in found} == {id(x) for x in held}


@pytest.mark.parametrize("kind", [Registry, exported.Registry])
def test_an_unknown_kind_is_an_error_that_names_the_known_ones(kind):
    sides = kind("side", {"left": -1, "right": 1})
    assert sides["left"] == -1
    with pytest.raises(ValueError, match="unknown side 'up'; known are left, right"):
        sides["up"]


# --- one function or class and one line are enough for a new kind; here it takes a known name,
# since the config admits no other


def test_a_new_score(monkeypatch):
    def last(attended, _, __):
        return jnp.broadcast_to(jnp.arange(attended.tokens.shape[1] - 1.0), (2, 4))

    monkeypatch.setitem(blocks.SCORES, "norm", last)
    sparsify = config.SparsifyConfig(score="norm", rest="drop")
    block = blocks.PruningBlock(2, 8, True, 1e-6, sparsify=sparsify, keep_rate=0.5)
    patch_ids = jnp.array([[1, 3, 5, 7], [0, 2, 4, 6]])
    pruned, _ = block.init_with_output(jax.random.key(0), jnp.asarray(random(2, 5, 4)), patch_ids)
    assert pruned.tokens.shape == (2, 3, 4)
    np.testing.assert_array_equal(pruned.patch_ids, patch_ids[:, 2:])


class ClipSum(nn.Module):
    """Adds the sum of a clip's frames to each token of the text."""

    condenses_text = False

    config: config.FusionConfig
    text: config.TextEncoderConfig
    deterministic: bool = True
    compute: Compute = Compute()

    def __call__(self, text: TextFeatures, video: VideoFeatures, rows=None):
        """Returns the text tokens."""
        clips = Source(video.frame_cls.sum(axis=1, keepdims=True), rows)
        return text.tokens + clips.gather(clips.tokens)


def test_a_new_fusion(monkeypatch):
    monkeypatch.setitem(fusion.FUSIONS, "multiway", ClipSum)
    model = small_model(fusion=config.FusionConfig("multiway"))
    text = TextFeatures(random(4, 6, 16), np.ones((4, 6), bool))
    video = VideoFeatures(
        random(2, 3, 5, 16),
        random(2, 3, 16),
        (np.zeros((2, 3, 5), np.int32),),
        np.zeros((2, 3, 9), bool),
    )
    text, video = jax.tree.map(jnp.asarray, (text, video))
    rows = jnp.array([[0, 1, 1, 0]])

    def run(model):
        fused = model.fuse(video, text, rows)
        return fused, model.fused_words(text, fused)

    fused, words = model.apply({}, method=run)
    expected = text.tokens + video.frame_cls.sum(axis=1)[rows[0]][:, None]
    np.testing.assert_allclose(fused, expected, rtol=1e-6)
    np.testing.assert_array_equal(words, fused)
