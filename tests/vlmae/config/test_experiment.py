"""Configs: checked when made, the same after a trip through JSON, flags on the command line."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.fields import Checked, field_types
from experiments.quickstart import get_config
from experiments.sweeps import SWEEPS
from vlmae.cli.experiment import main
from vlmae.cli.options import parse
from vlmae.config import experiment as c
from vlmae.config import model as m
from vlmae.config.tree import flatten, override
from vlmae.runs.workdir import config_differences, save_config

ROOT = Path(__file__).parents[3]


def test_json_round_trip(tmp_path):
    config = dataclasses.replace(
        get_config(),
        data=DataConfig(train=(SourceConfig("a", weight=0.5), SourceConfig("b", num_frames=1))),
        mesh=c.MeshConfig(data=2, fsdp=-1),
    )
    save_config(config, tmp_path / "config.json")
    assert c.load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"video": {"widht": 8}}}, "unknown field model.video.widht"),
        ({"data": {"train": [{"nam": "x"}]}}, "unknown field data.train.0.nam"),
        ({"optim": {"schedule": "step"}}, "--optim.schedule"),
        ({"train": {"steps": 0}}, "--train.steps"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change))
    with pytest.raises(ValueError) as error:
        c.load_config(path)
    assert str(path) in str(error.value) and message in str(error.value)


def refusal(make) -> str:
    """The message with which a config is refused."""
    with pytest.raises(UserError) as error:
        make()
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: m.MaskConfig(ratio=1.0), ["MaskConfig", "--ratio", "less than 1"]),
        (lambda: m.MaskConfig(ratio=math.nan), ["MaskConfig", "--ratio", "nan"]),
        (lambda: m.MaskConfig("grid", 0.5), ["--ratio=0.5", "--scheme=grid"]),
        (lambda: m.PixelDecoderConfig(num_heads=5), ["--num-heads=5", "--width=384"]),
        (lambda: m.PixelDecoderConfig(width=6), ["--width", "multiple of 4"]),
        (lambda: m.PixelDecoderConfig(target_ratio=1.0), ["--target-ratio", "less than 1", "1.0"]),
        (lambda: m.TextEncoderConfig(dropout=1.0), ["--dropout", "less than 1"]),
        (lambda: m.FrameSelectorConfig(width=10), ["--num-heads=4", "--width=10"]),
        (lambda: m.SparsifyConfig(keep_rate=0.0), ["--keep-rate", "greater than 0"]),
        (lambda: m.SparsifyConfig(eval_keep_rate=1.5), ["--eval-keep-rate", "at most 1", "1.5"]),
        (
            lambda: m.SparsifyConfig(warmup_rates=(1.0, 0.0), warmup_steps=2),
            ["--warmup-rates.1", "greater than 0"],
        ),
        (lambda: m.SparsifyConfig(warmup_steps=5), ["--warmup-rates=()", "--warmup-steps=5"]),
        (lambda: m.SparsifyConfig(warmup_rates=(0.9,)), ["--warmup-rates", "--warmup-steps=0"]),
        (lambda: m.SparsifyConfig(stages=(6, 3)), ["--stages=(6, 3)", "ascending"]),
        (lambda: m.SparsifyConfig(stages=(3, 3)), ["--stages=(3, 3)", "ascending"]),
        (lambda: m.SparsifyConfig(stages=(-1,)), ["--stages.0", "at least 0"]),
        (
            lambda: m.VideoEncoderConfig(depth=9, sparsify=m.SparsifyConfig(eval_keep_rate=0.7)),
            ["--sparsify.stages=(3, 6, 9)", "9", "--depth"],
        ),
        (
            lambda: m.VideoEncoderConfig(sparsify=m.SparsifyConfig(keep_rate=0.7, stages=())),
            ["--sparsify.stages=()"],
        ),
        (
            lambda: m.VideoEncoderConfig(
                depth=2, sparsify=m.SparsifyConfig(warmup_rates=(0.9,), warmup_steps=1)
            ),
            ["--sparsify.stages"],
        ),
        (lambda: c.ObjectivesConfig(0.0, 0.0, 0.0, 0.0), ["--vtc", "--label", "above 0"]),
        (lambda: c.ObjectivesConfig(mcm_template="{}"), ["--mcm-template"]),
        (
            lambda: c.ObjectivesConfig(mlm=0.0, mask_text_for="all"),
            ["--mask-text-for=all", "--mlm is 0"],
        ),
        (lambda: c.MeshConfig(data=-1, fsdp=-1), ["--data=-1", "--fsdp=-1"]),
        (lambda: c.EvaluationConfig(choices=1), ["--choices"]),
        (lambda: SourceConfig(num_frames=0), ["SourceConfig", "--num-frames", "at least 1"]),
        (lambda: DataConfig(train=()), ["--train"]),
    ],
)
def test_a_part_made_alone_is_checked(make, named):
    message = refusal(make)
    assert all(name in message for name in named), message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.video.mask.ratio": -1}, ["--model.video.mask.ratio", "at least 0", "-1"]),
        ({"model.video.mask.scheme": "grid"}, ["--model.video.mask.scheme=grid"]),
        (
            {"model.video.mask.scheme": "grid", "model.video.mask.ratio": 0.8889},  # of 14 x 14
            ["--model.video.mask.ratio=0.8889", "0.75 (2 x 2)", "0.9796 (7 x 7)"],
        ),
        ({"model.video.mask.scheme": "x"}, ["--model.video.mask.scheme", "tube", "'x'"]),
        ({"model.text.adapter.frozen_blocks": 99}, ["--model.text.adapter.frozen-blocks=99"]),
        ({"model.video.adapter.width": 7}, ["--model.video.adapter.num-heads=4"]),
        ({"model.video.layout.pixel_mean": [0.5]}, ["--model.video.layout.pixel-mean", "3"]),
        ({"model.video.time_depth": -2}, ["--model.video.time-depth", "-2"]),
        ({"data.train.0.weight": 0.0}, ["--data.train.0.weight", "greater than 0"]),
        ({"data.image_size": 100}, ["--data.image-size=100", "--model.video.patch-size=16"]),
        ({"data.text_len": 1000}, ["--data.text-len=1000", "--model.text.max-len=512"]),
        (
            {"data.num_others": 2, "objectives.mcm": 1.0},
            ["--data.num-others=2", "--objectives.mcm-template"],
        ),
        ({"objectives.mlm_ratio": 0.0}, ["--objectives.mlm-ratio", "greater than 0"]),
        ({"objectives.vtm_scope": "shard"}, ["--objectives.vtm-scope", "global, local"]),
        ({"objectives.answer": 1.0}, ["--objectives.answer", "--data.task=questions"]),
        ({"model.video.mask.ratio": 0.0}, ["--objectives.mvm", "--model.video.mask.ratio"]),
        (
            {"objectives.vtm": 0.0, "evaluation.rerank_top_k": 8},
            ["--evaluation.rerank-top-k", "--objectives.vtm"],
        ),
        ({"optim.accumulate_steps": 3}, ["--data.batch-size=32", "--optim.accumulate-steps=3"]),
        ({"optim.warmup_steps": 10_000}, ["--optim.warmup-steps=10000", "--train.steps=10000"]),
        ({"optim.b2": 1}, ["--optim.b2", "less than 1"]),
        ({"train.init_from": "a", "train.init.text": "b"}, ["--train.init-from"]),
        ({"train.save_every_steps": 0}, ["--train.save-every-steps"]),
        ({"seed": "one"}, ["--seed", "int", "'one'"]),
        ({"seed": True}, ["--seed", "int", "True"]),
        ({"seed": 2**70}, ["--seed", str(2**70)]),
        ({"optim.learning_rate": 2**2000}, ["--optim.learning-rate"]),
        ({"optim.learning_rate": math.inf}, ["--optim.learning-rate", "inf"]),
        ({"name": "../../x"}, ["--name", "'../../x'", "without .."]),
        ({"name": "/tmp/x"}, ["--name", "'/tmp/x'"]),
        ({"name": "a\n\x1b[2J"}, ["--name", r"'a\n\x1b[2J'"]),
        ({"data.train.0.name": "../x"}, ["--data.train.0.name", "'../x'"]),
        ({"data.eval.name": "a/../../x"}, ["--data.eval.name"]),
    ],
)
def test_a_refused_field_is_named_by_its_flag(changes, named):
    message = refusal(lambda: override(c.ExperimentConfig(), changes))
    assert all(name in message for name in named), message


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
        "model.fusion.depth",
        "model.fusion.sampler.text_latents",
        "model.fusion.sampler.video_latents",
    ],
)
@pytest.mark.parametrize("value", [0, -12])
def test_sizes_are_at_least_one(field, value):
    message = refusal(lambda: override(c.ExperimentConfig(), {field: value}))
    assert message == f"--{field.replace('_', '-')} must be at least 1, not {value}"


def test_every_config_checks_itself():
    """A config that forgets the base class would be checked only as a part of another."""

    def classes(kind: type) -> set[type]:
        nested = [k for k in field_types(kind).values() if dataclasses.is_dataclass(k)]
        return {kind}.union(*map(classes, nested))

    found = classes(c.ExperimentConfig) | {SourceConfig}
    assert len(found) > 15 and all(issubclass(kind, Checked) for kind in found)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"optim": {"learning_rate": Infinity}}', ["--optim.learning-rate", "inf"]),
        ('{"optim": {"learning_rate": NaN}}', ["--optim.learning-rate", "nan"]),
        ('{"optim": {"learning_rate": "1"}}', ["--optim.learning-rate", "'1'"]),
        ('{"seed": 1180591620717411303424}', ["--seed"]),
        ('{"seed": 0.5}', ["--seed", "0.5"]),
        ('{"data": {"train": {}}}', ["--data.train", "list"]),
        ('{"data": {"train": [3]}}', ["--data.train.0", "object"]),
        ('{"data": []}', ["--data", "object"]),
        ("[]", ["object"]),
        ('{"seed": ', ["line 1"]),
    ],
)
def test_json_that_is_no_config_is_refused_with_its_field(tmp_path, text, named):
    path = tmp_path / "config.json"
    path.write_text(text)
    message = refusal(lambda: c.load_config(path))
    assert all(name in message for name in [str(path), *named]), message


@pytest.mark.parametrize(("stored", "policy"), [(False, "none"), (True, "full"), ("full", "full")])
def test_runs_from_before_there_were_policies_of_remat_are_read(stored, policy, tmp_path):
    path = tmp_path / "config.json"
    save_config(c.ExperimentConfig(), path)
    tree = json.loads(path.read_text())
    tree["model"]["remat"] = stored
    path.write_text(json.dumps(tree))
    assert c.load_config(path) == override(c.ExperimentConfig(), {"model.remat": policy})


def test_what_is_switched_off_needs_no_stages():
    assert not m.VideoEncoderConfig(depth=1).sparsify.is_used


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
    ],
)
def test_an_override_that_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        override(get_config(), change)


def test_configs_that_name_the_bootstraps_resamples_stay_readable():
    tree = dataclasses.asdict(get_config())
    tree["evaluation"]["resamples"] = 1000
    assert c.config_of(json.loads(json.dumps(tree))) == get_config()


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


@pytest.mark.e2e
def test_help_shows_the_documentation_of_fields():
    command = [sys.executable, "experiments/quickstart.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "SMAUG in minutes on a laptop CPU" in text
    assert "--model.video.mask.ratio" in text and "Fraction of the patches removed" in text
    assert "--data.train.0.num-frames" in text


def test_help_begins_with_data_and_model(capsys):
    with pytest.raises(SystemExit):
        parse(get_config, SWEEPS, ["--help"])
    text = capsys.readouterr().out
    flags = ["--seed", "--data.batch-size", "--model.embed-dim", "--train.steps", "--partition"]
    places = [re.search(rf"^\W*{flag}\b", text, flags=re.MULTILINE).start() for flag in flags]
    assert places == sorted(places)
    assert "Sweeps: " in text and "method" in text


def test_the_config_is_printed_and_nothing_else_happens(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x.py", "--print-config", "--model.video.mask.ratio", "0.5"])
    main(get_config, SWEEPS)
    (tmp_path / "printed.json").write_text(capsys.readouterr().out)
    expected = override(get_config(), {"model.video.mask.ratio": 0.5})
    assert c.load_config(tmp_path / "printed.json") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["printed.json"]


def test_the_config_of_a_run_of_a_sweep_is_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x.py", "--print-config", "--sweep=seed", "--index=2"])
    main(get_config, SWEEPS)
    assert json.loads(capsys.readouterr().out)["seed"] == 2
    assert not list(tmp_path.iterdir())
