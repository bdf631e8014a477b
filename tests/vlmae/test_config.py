"""Configs: checked when made, the same after a trip through JSON, flags on the command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.config import DataConfig, SourceConfig
from experiments.quickstart import get_config
from vlmae import config as c
from vlmae import model_config as m
from vlmae.config_tree import flatten, override
from vlmae.workdir import config_differences

ROOT = Path(__file__).parents[2]


def test_json_round_trip(tmp_path):
    config = dataclasses.replace(
        get_config(),
        data=DataConfig(train=(SourceConfig("a", weight=0.5), SourceConfig("b", num_frames=1))),
        mesh=c.MeshConfig(data=2, fsdp=-1),
    )
    c.save_config(config, tmp_path / "config.json")
    assert c.load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"video": {"widht": 8}}}, "unknown field model.video.widht"),
        ({"data": {"train": [{"nam": "x"}]}}, "unknown field data.train.0.nam"),
        ({"optim": {"schedule": "step"}}, "optim.schedule='step' is none of cosine, linear"),
        ({"train": {"steps": 0}}, "train.steps must be at least 1, not 0"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change))
    with pytest.raises(ValueError) as error:
        c.load_config(path)
    assert str(path) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: m.MaskConfig(ratio=1.0), r"mask.ratio must be in \[0, 1\), not 1.0"),
        (lambda: m.MaskConfig("grid", 0.5), "mask.ratio=0.5 does not fit the grid scheme"),
        (
            lambda: m.ModelConfig(pixel_decoder=m.PixelDecoderConfig(num_heads=5)),
            "model.pixel_decoder.num_heads=5 does not divide model.pixel_decoder.width=384",
        ),
        (lambda: m.ModelConfig(text=m.TextEncoderConfig(dropout=1.0)), "model.text.dropout=1.0"),
        (lambda: c.ObjectivesConfig(0.0, 0.0, 0.0, 0.0), "every weight is 0"),
        (lambda: c.ObjectivesConfig(vtm=-1.0), "objectives.vtm must not be negative"),
        (lambda: c.ObjectivesConfig(mlm_ratio=0.0), "objectives.mlm_ratio=0"),
        (lambda: c.OptimConfig(learning_rate=0.0), "optim.learning_rate must be positive"),
        (lambda: c.MeshConfig(data=-1, fsdp=-1), "at most one -1"),
        (lambda: c.TrainConfig(save_every_steps=0), "train.save_every_steps must be at least 1"),
        (lambda: c.EvaluationConfig(-1), "evaluation.rerank_top_k must not be negative"),
        (
            lambda: c.ExperimentConfig(data=DataConfig(image_size=100)),
            "data.image_size=100 is not a multiple of model.video.patch_size=16",
        ),
        (
            lambda: c.ExperimentConfig(data=DataConfig(text_len=1000)),
            "data.text_len=1000 exceeds model.text.max_len=512",
        ),
        (
            lambda: c.ExperimentConfig(
                model=m.ModelConfig(video=m.VideoEncoderConfig(mask=m.MaskConfig("none")))
            ),
            "objectives.mvm reconstructs removed patches",
        ),
        (
            lambda: c.ExperimentConfig(
                objectives=c.ObjectivesConfig(vtm=0.0), evaluation=c.EvaluationConfig(8)
            ),
            "evaluation.rerank_top_k needs the matching head",
        ),
        (
            lambda: c.ExperimentConfig(optim=c.OptimConfig(accumulate_steps=3)),
            "data.batch_size=32 is not divisible by optim.accumulate_steps=3",
        ),
        (
            lambda: c.ExperimentConfig(optim=c.OptimConfig(warmup_steps=10_000)),
            "optim.warmup_steps=10000 leaves nothing of train.steps=10000",
        ),
    ],
)
def test_every_check_names_its_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "field",
    [
        "model.embed_dim",
        "model.answer_depth",
        "model.video.num_heads",
        "model.video.patch_size",
        "model.text.mlp_dim",
        "model.pixel_decoder.num_heads",
        "model.selector.depth",
        "model.video.adapter.num_heads",
        "model.fusion.sampler.text_latents",
    ],
)
@pytest.mark.parametrize("value", [0, -12])
def test_sizes_are_at_least_one(field, value):
    name = field.removeprefix("model.").removeprefix("video.adapter.")
    with pytest.raises(ValueError, match=rf"{name} must be at least 1, not {value}"):
        override(c.ExperimentConfig(), {field: value})


@pytest.mark.parametrize(("stored", "policy"), [(False, "none"), (True, "full"), ("full", "full")])
def test_runs_from_before_there_were_policies_of_remat_are_read(stored, policy, tmp_path):
    path = tmp_path / "config.json"
    c.save_config(c.ExperimentConfig(), path)
    tree = json.loads(path.read_text())
    tree["model"]["remat"] = stored
    path.write_text(json.dumps(tree))
    assert c.load_config(path) == override(c.ExperimentConfig(), {"model.remat": policy})


def of_video(**changes) -> m.ModelConfig:
    return m.ModelConfig(video=m.VideoEncoderConfig(**changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: m.SparsifyConfig(keep_rate=0.0), r"sparsify.keep_rate must be in \(0, 1\], not 0"),
        (lambda: m.SparsifyConfig(eval_keep_rate=1.5), "sparsify.eval_keep_rate must be in .* 1.5"),
        (
            lambda: m.SparsifyConfig(warmup_rates=(1.0, 0.0), warmup_steps=2),
            "sparsify.warmup_rates.1 must be in",
        ),
        (lambda: m.SparsifyConfig(warmup_steps=-1), "sparsify.warmup_steps is negative: -1"),
        (lambda: m.SparsifyConfig(warmup_steps=5), "and sparsify.warmup_steps=5 go together"),
        (
            lambda: m.SparsifyConfig(warmup_rates=(0.9,)),
            r"sparsify.warmup_rates=\(0.9,\) and sparsify.warmup_steps=0 go together",
        ),
        (lambda: m.SparsifyConfig(stages=(6, 3)), r"sparsify.stages=\(6, 3\) must be ascending"),
        (lambda: m.SparsifyConfig(stages=(3, 3)), r"sparsify.stages=\(3, 3\) must be ascending"),
        (lambda: m.SparsifyConfig(stages=(-1,)), r"sparsify.stages=\(-1,\) must be ascending"),
        (
            lambda: of_video(depth=9, sparsify=m.SparsifyConfig(eval_keep_rate=0.7)),
            r"model.video.sparsify.stages=\(3, 6, 9\) must name blocks of the 9 that "
            "model.video.depth gives",
        ),
        (
            lambda: of_video(sparsify=m.SparsifyConfig(keep_rate=0.7, stages=())),
            r"model.video.sparsify.stages=\(\) must name blocks",
        ),
        (
            lambda: of_video(
                depth=2, sparsify=m.SparsifyConfig(warmup_rates=(0.9,), warmup_steps=1)
            ),
            "model.video.sparsify.stages=",
        ),
        (lambda: of_video(time_frames=-1), "model.video.time_frames must not be negative: -1"),
        (lambda: of_video(time_depth=-2), "model.video.time_depth must not be negative: -2"),
        (lambda: m.FrameSelectorConfig(frames=-1), "selector.frames must not be negative: -1"),
        (
            lambda: m.FrameSelectorConfig(width=10),
            "selector.num_heads=4 does not divide selector.width=10",
        ),
        (
            lambda: m.PixelDecoderConfig(target_ratio=1.0),
            r"pixel_decoder.target_ratio must be in \[0, 1\), not 1.0",
        ),
        (
            lambda: c.ObjectivesConfig(mlm=0.0, mask_text_for="all"),
            "objectives.mask_text_for=all hides words, but objectives.mlm is 0",
        ),
        (
            lambda: override(c.ExperimentConfig(), {"objectives.vtm_scope": "shard"}),
            "objectives.vtm_scope='shard' is none of global, local",
        ),
        (
            lambda: override(c.ExperimentConfig(), {"model.video.sparsify.score": "max"}),
            "model.video.sparsify.score='max' is none of cls_attention",
        ),
    ],
)
def test_every_check_of_sparsification_names_its_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_switched_off_needs_no_stages():
    assert not of_video(depth=1).video.sparsify.is_used


def test_the_number_of_frames_kept():
    half, three = m.FrameSelectorConfig("mlp"), m.FrameSelectorConfig("mlp", frames=3)
    assert [half.count(t) for t in (1, 2, 3, 4, 12)] == [1, 1, 1, 2, 6]
    assert [three.count(t) for t in (2, 3, 12)] == [2, 3, 3]


def test_override_changes_the_named_fields_only():
    old = get_config()
    new = override(old, {"model.video.mask.ratio": 0.75, "data.train.0.num_frames": 8, "seed": 2})
    assert old == get_config()
    changed = {k: v for k, v in flatten(new).items() if flatten(old)[k] != v}
    assert changed == {"model.video.mask.ratio": 0.75, "data.train.0.num_frames": 8, "seed": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.video.mask.rato": 0.5}, "unknown field model.video.mask.rato"),
        ({"data.train.1.weight": 0.5}, "unknown field data.train.1.weight"),
        ({"seed.x": 1}, "unknown field seed.x"),
        ({"model.video.mask.ratio": 1.5}, "mask.ratio must be in"),
        ({"seed": "one"}, "seed must be of type int, not 'one'"),
    ],
)
def test_an_override_that_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        override(get_config(), change)


def test_differences_of_a_continued_run():
    old = get_config()
    other_mask = m.MaskConfig(ratio=0.75)
    video = dataclasses.replace(old.model.video, mask=other_mask)
    new = dataclasses.replace(
        old,
        name="another name is fine",
        train=dataclasses.replace(old.train, steps=10_000),
        model=dataclasses.replace(old.model, video=video),
    )
    ratio = old.model.video.mask.ratio
    assert config_differences(old, new) == [f"model.video.mask.ratio: {ratio} there, 0.75 here"]


def test_help_shows_the_documentation_of_fields():
    command = [sys.executable, "experiments/quickstart.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "SMAUG in minutes on a laptop CPU" in text
    assert "--model.video.mask.ratio" in text and "Fraction of the patches removed" in text
    assert "--data.train.0.num-frames" in text
