"""Lengths in epochs, as flags and as steps of what is prepared."""

import pytest
from tiny_experiment import get_config

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.row_counts import count_rows
from experiments import quickstart
from experiments.multi import pretrain as multi_pretrain
from experiments.smaug import pretrain as smaug_pretrain
from vlmae.cli.options import parse
from vlmae.cli.run_experiment import resolve
from vlmae.config.epochs import change, in_steps
from vlmae.config.phases import segments
from vlmae.config.tree import override
from vlmae.runs.workdir import config_differences

LENGTHS = ("steps", "eval_every_steps", "save_every_steps")


def lengths(config):
    return [getattr(config.train, name) for name in LENGTHS] + [config.optim.warmup_steps]


def test_steps_follow_from_rows_and_batch():
    changes = {"train.epochs": 3.0, "train.eval_every_epochs": 1.0, "train.save_every_epochs": 0.5}
    config = override(get_config(), changes | {"optim.warmup_share": 0.1, "data.batch_size": 10})
    assert lengths(in_steps(config, 100)) == [30, 10, 5, 3]
    assert lengths(in_steps(config, 1)) == [1, 1, 1, 0], "at least a step"
    kept = override(get_config(), {"optim.warmup_share": 0.5})
    assert lengths(in_steps(kept, 100)) == [8, 0, 4, 4], "a share alone leaves the steps"
    assert in_steps(get_config(), 100) == get_config()
    with pytest.raises(UserError, match=r"warmup-steps=5 leaves nothing of --train.steps=3"):
        in_steps(override(get_config(), {"optim.warmup_steps": 5, "train.epochs": 0.25}), 100)


@pytest.mark.parametrize("recipe", [smaug_pretrain, multi_pretrain])
@pytest.mark.parametrize("batch_size", [64, 256, 1024])
def test_the_papers_epochs_do_not_depend_on_the_batch(recipe, batch_size):
    config = parse(recipe.get_config, (), ["--data.batch-size", str(batch_size)]).config
    resolved = in_steps(config, 5_440_000)
    seen = resolved.train.steps * batch_size / 5_440_000
    assert seen == pytest.approx(10, rel=1e-3)
    warmup = 0.1 if recipe is smaug_pretrain else 0.05
    assert resolved.optim.warmup_steps / resolved.train.steps == pytest.approx(warmup, abs=1e-3)
    assert resolved.train.eval_every_steps * 10 == pytest.approx(resolved.train.steps, rel=1e-3)


def test_flags_in_steps_count_whatever_the_recipe_says():
    flags = ["--train.steps", "7", "--optim.warmup-steps=2", "--train.eval_every_steps", "3"]
    config = in_steps(parse(smaug_pretrain.get_config, (), flags).config, 5_440_000)
    assert lengths(config) == [7, 3, 2000, 2]
    config = parse(quickstart.get_config, (), ["--train.epochs", "2", "--optim.warmup-steps=9"])
    assert in_steps(config.config, 3000).train.steps == 188
    with pytest.raises(UserError, match=r"--train.steps and --train.epochs say the same"):
        parse(quickstart.get_config, (), ["--train.steps=2", "--train.epochs=1"])


def test_sweeps_in_steps_count_too():
    config = override(get_config(), {"train.epochs": 3.0})
    assert in_steps(change(config, {"train.steps": 5}), 100).train.steps == 5
    assert in_steps(change(config, {"seed": 5}), 80).train.steps == 30
    with pytest.raises(UserError, match="give one of them"):
        change(config, {"train.steps": 5, "train.epochs": 1.0})


def test_phases_follow_from_the_prepared_data(tiny_data_dir):
    phases = [{"share": 0.5, "mask_ratio": 0.75}, {"share": 0.5}]
    where = {"data.data_dir": str(tiny_data_dir), "train.epochs": 2.0, "train.phases": phases}
    config, _, _ = resolve(override(get_config(), where))
    assert config.train.steps == 36, "144 captions by 8, twice"
    assert [(part.start, part.stop) for part in segments(config)] == [(0, 18), (18, 36)]


def test_a_run_may_go_on_for_more_epochs():
    longer = override(get_config(), {"train.epochs": 9.0, "train.eval_every_epochs": 1.0})
    assert config_differences(get_config(), in_steps(longer, 100)) == []


def test_rows_are_what_the_task_reads(tmp_path, tiny_data_dir):
    config = DataConfig(data_dir=str(tiny_data_dir))
    assert count_rows(SourceConfig("shapes", "test"), config) == (12, 12)
    folder = prepare("shapes", tmp_path, num_train=3, num_val=1, num_test=1, frame_size=16)
    assert folder.is_dir()
    asked = DataConfig(data_dir=str(tmp_path), task="questions")
    clips, questions = count_rows(SourceConfig("shapes", "train"), asked)
    assert clips == 3 and questions > 3


def test_data_names_the_only_source():
    config = parse(quickstart.get_config, (), ["--data", "mine"]).config
    assert config.data.train[0].name == config.data.eval_source.name == "mine"
    with pytest.raises(UserError, match=r"--data names one training source, and there are webvid"):
        parse(smaug_pretrain.get_config, (), ["--data=mine"])
