"""Every experiment file builds; its model and its losses fit together (shapes, no compile)."""

import dataclasses
import sys

import jax
import pytest
import transformers
from experiment_files import EXPERIMENTS, docs_of, filled
from jaxtyping import PyTree

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Batch
from vlmae.cli import experiment
from vlmae.cli.options import parse
from vlmae.models.video_language import build_model
from vlmae.training.gradients import split_key
from vlmae.training.objectives import compute_losses
from vlmae.training.step import abstract_batch, abstract_state
from vlmae.weights.huggingface import differences, open_published


def marks_of(name: str) -> tuple:
    """Methods and ablations differ in a field or two, so one stands for all by default."""
    is_twin = name.startswith(("offline/claims", "offline/ablations"))
    is_twin &= not name.endswith(" all_merged_small")
    return (pytest.mark.slow,) if is_twin else ()


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks_of(n)) for n in EXPERIMENTS])
def test_experiment(name):
    file = name.partition(" ")[0]
    docs = docs_of(EXPERIMENTS[name])
    assert f"python experiments/{file}.py" in docs and "esult" in docs
    config = filled(EXPERIMENTS[name]())
    params, model = abstract_state(config).params, build_model(config, deterministic=False)

    def losses(params: PyTree, batch: Batch) -> dict:
        key, rngs = split_key(jax.random.key(0))
        args = (batch, key, config.objectives)
        return model.apply({"params": params}, *args, method=compute_losses, rngs=rngs).metrics

    for source in config.data.train:
        metrics = jax.eval_shape(losses, params, abstract_batch(config, source))
        assert {f"loss/{name}" for name in config.objectives.weights} <= set(metrics)


def test_the_papers_setting_has_the_papers_size():
    """ViT-B/16 is 86 million parameters, BERT-base 110 with its 3 upper layers' cross-attention."""
    from experiments.smaug import pretrain as smaug_pretrain

    config = smaug_pretrain.get_config()
    text = dataclasses.replace(config.model.text, vocab_size=30522)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    params = abstract_state(config).params

    def millions(*parts: str) -> float:
        return sum(x.size for part in parts for x in jax.tree.leaves(params[part])) / 1e6

    assert millions("video_encoder") == pytest.approx(85.6, abs=0.2)
    assert millions("text_encoder", "fusion") == pytest.approx(108.9 + 3 * 2.36, abs=0.5)
    assert millions("pixel_decoder") == pytest.approx(7.7, abs=0.2)


# Of the published config.json of each, what is not its class's default.
BASES = {
    "smaug/pretrain singularity": transformers.BeitConfig(use_relative_position_bias=True),
    "smaug/pretrain_stage2 singularity": transformers.BeitConfig(use_relative_position_bias=True),
    "multi/pretrain alpro": transformers.ViTConfig(),
}


@pytest.mark.parametrize("name", BASES)
def test_a_variant_fits_the_weights_that_it_names(name, tmp_path):
    """No weights are needed to see it: the layout is that of the base's config."""
    video, text = EXPERIMENTS[name]().model.video, filled(EXPERIMENTS[name]()).model.text
    BASES[name].save_pretrained(tmp_path / "video")
    assert not list(differences(open_published(str(tmp_path / "video")).fields, video))
    transformers.BertConfig().save_pretrained(tmp_path / "text")
    assert not list(differences(open_published(str(tmp_path / "text"), "text").fields, text))


def test_a_variant_without_a_name_takes_flags_alone():
    variants = {"": EXPERIMENTS["multi/pretrain"], "alpro": EXPERIMENTS["multi/pretrain alpro"]}
    for arguments in ([], ["--seed", "3"]):
        command = parse(variants, (), arguments)
        assert (command.config.name, command.config.seed) == (
            "multi_pretrain",
            3 * len(arguments) // 2,
        )
    assert parse(variants, (), ["alpro", "--seed", "3"]).config.name == "multi_pretrain_alpro"
    with pytest.raises(UserError, match=r"names a variant, not 'alpor'; there is: alpro$"):
        parse(variants, (), ["alpor"])


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if n.startswith(("smaug/", "multi/"))])
def test_no_recipe_looks_at_test_while_it_trains(name):
    config = EXPERIMENTS[name]()
    watched = config.train.eval_every_epochs or config.train.eval_every_steps
    assert config.data.eval.split == "val" or not watched


def run_with_variants(monkeypatch, *arguments):
    """The config that `main` would run, given two variants."""
    ran = []
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *arguments])
    monkeypatch.setattr(experiment, "run", lambda command, sweeps: ran.append(command.config))
    experiment.main({name: EXPERIMENTS[f"smaug/retrieval {name}"] for name in ("msrvtt", "didemo")})
    return ran[0]


def test_the_first_argument_names_the_variant(monkeypatch):
    config = run_with_variants(monkeypatch, "didemo", "--seed", "3")
    assert (config.name, config.seed) == ("smaug_didemo_retrieval", 3)


@pytest.mark.parametrize("arguments", [(), ("--seed", "3"), ("msvd",)])
def test_a_file_with_variants_asks_for_one(monkeypatch, arguments):
    with pytest.raises(SystemExit, match=r"msrvtt, didemo"):
        run_with_variants(monkeypatch, *arguments)


def test_help_without_a_variant_lists_them(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_with_variants(monkeypatch, "--help")
    assert not stopped.value.code and "msrvtt, didemo" in capsys.readouterr().out
