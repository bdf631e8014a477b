"""Data, a run and an export made at revision 7f76145 are still read, with equal results.

`tests/data/made_at_7f76145.tar.xz` holds what `tests/support/tiny_experiment.py` left there after
two steps on 16 clips; the JSON beside it what that revision computed from it.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

import vlmae
from data_pipelines.loading.evaluation import EvalData, eval_data
from vlmae.cli.run_experiment import run_experiment
from vlmae.config.tree import override
from vlmae.evaluation.evaluate import evaluate_workdir
from vlmae.runs.checkpoint import load_params
from vlmae.runs.load import load_run, tokenizer_of
from vlmae.runs.metric_writer import read_metrics
from vlmae.runs.workdir import save_config

ARCHIVE = Path(__file__).parents[2] / "data" / "made_at_7f76145.tar.xz"
EXPECTED = json.loads(ARCHIVE.with_name("made_at_7f76145.json").read_text())


@pytest.fixture
def old(tmp_path) -> Path:
    """The folders `data`, `run` and `export`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def split(old: Path) -> EvalData:
    config = load_run(old / "run").data
    fields = {"data_dir": str(old / "data"), "tokenizer": str(tokenizer_of(old / "run"))}
    return eval_data(override(config, fields))


def test_prepared_data(old):
    data = split(old)
    assert list(data.texts.captions) == EXPECTED["captions"]
    means = [data.clip(i).mean() for i in range(data.num_clips)]
    np.testing.assert_allclose(means, EXPECTED["mean_pixel"], rtol=1e-12)


@pytest.mark.parametrize("kind", ["run", "export"])
def test_embeddings(old, kind):
    data, model = split(old), vlmae.load(old / kind)
    assert model.step == 2
    frames = np.stack([data.clip(i) for i in range(data.num_clips)])
    np.testing.assert_allclose(model.embed_video(frames), EXPECTED["clips"], atol=1e-5)
    np.testing.assert_allclose(model.embed_text(EXPECTED["captions"]), EXPECTED["texts"], atol=1e-5)


def test_parameters_of_run_and_export_are_equal(old):
    (ours, step), (exported, exported_step) = load_params(old / "run"), load_params(old / "export")
    assert step == exported_step == 2
    jax.tree.map(np.testing.assert_array_equal, ours, exported)


def test_evaluation(old):
    config = override(load_run(old / "run"), {"data.data_dir": str(old / "data")})
    save_config(config, old / "run" / "config.json")
    [metrics] = evaluate_workdir(old / "run").values()
    for name, value in EXPECTED["retrieval"].items():
        assert metrics[f"retrieval/{name}"] == value, name


def test_training_resumes(old):
    config = override(load_run(old / "run"), {"data.data_dir": str(old / "data"), "train.steps": 3})
    run_experiment(config, old / "run")
    lines = [line for line in read_metrics(old / "run") if line["step"] == 3]
    values = {name: value for line in lines for name, value in line.items()}
    expected = EXPECTED["step_3"]
    # That revision reached `final_ratio`, 1 % here, one step after the last.
    expected["optim/learning_rate"] = 0.01 * config.optim.learning_rate
    # It resized training's views by Pillow; OpenCV's pixels are a level off here and there.
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=2e-3, err_msg=name)
