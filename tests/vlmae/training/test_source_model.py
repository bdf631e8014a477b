"""What no shape shows of the model whose parameters a run begins with."""

import pytest
from helpers import SMALL

from data_pipelines.text.tokenize import SPECIAL_TOKENS, Tokenizer
from vlmae.config.tree import override
from vlmae.runs.workdir import save_config
from vlmae.training.source_model import UNSEEN, with_source_model

LAYOUT = "model.video.layout."
THEIRS = {
    f"{LAYOUT}eps": 1e-12,
    f"{LAYOUT}activation": "quick_gelu",
    f"{LAYOUT}pixel_mean": (0.5, 0.5, 0.5),
    "model.text.layout.eps": 1e-5,
}


@pytest.fixture
def source(tmp_path):
    """Writes the config of a run, and gives a config that begins with its parameters."""

    def write(changes):
        save_config(override(SMALL, changes), tmp_path / "config.json")
        return override(SMALL, {"train.init_from": str(tmp_path)})

    return write


def test_the_layout_is_taken_over_and_said(source, capsys):
    config = source(THEIRS)
    found = with_source_model(config)
    assert found == override(config, THEIRS)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[0].startswith(f"{LAYOUT}eps is 1e-12, as in ")
    assert with_source_model(found) == found and not capsys.readouterr().out
    assert with_source_model(SMALL) == SMALL


def test_what_is_meant_to_differ_stays(source):
    config = override(source(THEIRS), {"train.init_differs": (f"{LAYOUT}eps",)})
    layout = with_source_model(config).model.video.layout
    assert (layout.eps, layout.activation) == (SMALL.model.video.layout.eps, "quick_gelu")


@pytest.mark.parametrize("name", ["model.video.num_heads", "model.text.pooling"])
def test_other_fields_are_refused(source, name):
    value = {"model.video.num_heads": 1, "model.text.pooling": "mean"}[name]
    config = source({name: value})
    with pytest.raises(ValueError, match=rf"{name} is .*, there {value}\n.*--train.init-differs"):
        with_source_model(config)
    meant = override(config, {"train.init_differs": (name,)})
    assert with_source_model(meant) == meant


def test_other_words_are_refused(source, tmp_path):
    config = source({})
    for folder, words in (("tokenizer", ["red", "blue"]), ("own", ["blue", "red"])):
        Tokenizer.from_vocabulary([*SPECIAL_TOKENS, *words]).save(tmp_path / folder)
    config = override(config, {"data.tokenizer": str(tmp_path / "own")})
    with pytest.raises(ValueError, match=r"data\.tokenizer is "):
        with_source_model(config)
    meant = override(config, {"train.init_differs": ("data.tokenizer",)})
    assert with_source_model(meant) == meant


def test_a_name_that_is_none_of_them(source):
    config = override(source({}), {"train.init_differs": ("model.video.width",)})
    with pytest.raises(
        ValueError, match=f"init-differs=model.video.width is none of .*{UNSEEN[0]}"
    ):
        with_source_model(config)


def test_a_source_that_is_not_there_is_left_to_who_reads_it():
    config = override(SMALL, {"train.init_from": "/nowhere"})
    assert with_source_model(config) == config
