"""Every experiment file builds; its model and its step fit together (shapes only, no compile)."""

import dataclasses
import importlib
from pathlib import Path

import jax
import pytest

from data_pipelines.config import SourceConfig
from data_pipelines.records import Batch
from vlmae.choices import SLOT
from vlmae.config import ExperimentConfig, MeshConfig
from vlmae.config_tree import override
from vlmae.objectives import OBJECTIVES
from vlmae.sharding import make_mesh
from vlmae.train import make_init, make_step

FILES = sorted((Path(__file__).parents[2] / "experiments").glob("[!_]*.py"))


def abstract_batch(config: ExperimentConfig, source: SourceConfig) -> Batch:
    b, size, length = config.data.batch_size, config.data.image_size, config.data.text_len
    return Batch(
        video=jax.ShapeDtypeStruct((b, source.num_frames, size, size, 3), "uint8"),
        text_ids=jax.ShapeDtypeStruct((b, length), "int32"),
        text_mask=jax.ShapeDtypeStruct((b, length), "bool"),
        media_ids=jax.ShapeDtypeStruct((b,), "int32"),
        valid=jax.ShapeDtypeStruct((b,), "bool"),
        targets=None
        if config.data.task == "captions"
        else jax.ShapeDtypeStruct((b, config.model.num_classes), "bool"),
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_experiment(file):
    module = importlib.import_module(f"experiments.{file.stem}")
    assert f"python experiments/{file.stem}.py" in module.__doc__
    config = module.get_config()
    template = (101, 2054, SLOT, SLOT, SLOT, SLOT, 102)
    size = config.model.text.vocab_size or 30522
    filled = {"model.text.vocab_size": size, "objectives.mcm_template_ids": template}
    if config.data.task != "captions":
        filled["model.num_classes"] = 13
    config = override(config, filled)
    weights = {name: getattr(config.objectives, name) for name in OBJECTIVES}
    state = jax.eval_shape(make_init(config), 0)
    step = make_step(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), state)
    for source in config.data.train:
        after, metrics = jax.eval_shape(step, state, abstract_batch(config, source))
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
