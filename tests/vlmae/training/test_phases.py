"""Runs of several phases, and branches of a run: resumed or branched equals unbroken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from helpers import SMALL, init_params, random_batch
from run_checks import Stopped, assert_same_run, before_metrics_of, history, stop

from data_pipelines.schema.checks import MissingError, UserError
from vlmae.cli.run_experiment import run_experiment
from vlmae.config.experiment import PhaseConfig
from vlmae.config.tree import override
from vlmae.models.embeddings import resize_grid, sincos_positions
from vlmae.models.video_language import build_model
from vlmae.runs.checkpoint import load_params
from vlmae.runs.metric_writer import read_metrics

# Half of the steps on pictures of half the size, then all patches of the full size.
PHASES = {
    "data.image_size": 32,
    "model.video.positions": "learned",
    "train.phases": (
        PhaseConfig(share=0.5, mask_ratio=0.5, train_size=16, num_frames=1),
        PhaseConfig(share=0.5, mask_ratio=0.0),
    ),
}


@pytest.fixture(scope="module")
def phased(tiny_data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("phased")
    config = override(tiny_experiment.get_config(), {"data.data_dir": str(tiny_data_dir), **PHASES})
    run_experiment(config, workdir)
    return workdir


def test_each_phase_has_its_own_tokens_and_losses(phased, tiny_config):
    lines = {line["step"]: line for line in read_metrics(phased) if "loss/total" in line}
    patch, frames = tiny_config.model.video.patch_size, tiny_config.data.train[0].num_frames
    small, full = (16 // patch) ** 2, frames * (32 // patch) ** 2
    kept = [lines[step]["tokens/video_kept"] for step in sorted(lines)]
    half = tiny_config.train.steps // 2
    assert kept == [small * 0.5] * half + [full] * half
    has_mvm = ["loss/mvm" in lines[step] for step in sorted(lines)]
    assert has_mvm == [True] * half + [False] * half


def test_a_run_that_resumes_in_another_phase_equals_the_unbroken_one(
    phased, tiny_config, tmp_path, monkeypatch
):
    config = override(tiny_config, PHASES)
    with monkeypatch.context() as patch:
        before_metrics_of(7, stop, patch)
        with pytest.raises(Stopped):
            run_experiment(config, tmp_path)
    run_experiment(config, tmp_path)
    assert_same_run(tmp_path, phased)


WSD = {"optim.schedule": "wsd", "optim.decay_share": 0.25, "optim.warmup_steps": 1}


def test_a_decayed_branch_of_a_trunk_equals_a_run_of_its_length(tiny_config, tmp_path):
    trunk = override(tiny_config, WSD | {"optim.decay_share": 0.0, "train.keep_checkpoints": 9})
    run_experiment(override(trunk, {"train.save_every_steps": 2}), tmp_path / "trunk")
    alone = override(tiny_config, WSD)
    run_experiment(alone, tmp_path / "alone")
    branch = {"train.init_from": str(tmp_path / "trunk"), "train.init_step": 6}
    run_experiment(override(alone, branch), tmp_path / "branch")
    (params, step), (same, _) = map(load_params, (tmp_path / "branch", tmp_path / "alone"))
    assert step == tiny_config.train.steps
    jax.tree.map(np.testing.assert_array_equal, params, same)
    # Its record is that of an unbroken run, so its cost counts the trunk's steps.
    assert [line["step"] for line in history(tmp_path / "branch")] == [
        line["step"] for line in history(tmp_path / "alone")
    ]
    rates = [
        line["optim/learning_rate"]
        for line in history(tmp_path / "branch")
        if "optim/learning_rate" in line
    ]
    peak = tiny_config.optim.learning_rate
    np.testing.assert_allclose(rates, [0.0, *[peak] * 6, peak * alone.optim.final_ratio], rtol=1e-6)


def test_a_branch_that_cannot_be_is_refused(tiny_config, tmp_path, phased):
    config = override(tiny_config, PHASES | {"train.init_from": str(phased), "train.init_step": 3})
    with pytest.raises(MissingError, match=r"no checkpoint of step 3, but of \["):
        run_experiment(config, tmp_path)
    with pytest.raises(UserError, match="--seed is not 5"):
        run_experiment(override(config, {"seed": 5}), tmp_path / "other")


def test_smaller_pictures_read_the_positions_of_the_full_grid_interpolated():
    """Features of a half-size picture, by a model of that size that holds the resized table."""
    learned = override(SMALL, {"model.video.positions": "learned", "data.train_size": 8})
    model = build_model(learned, deterministic=False).clone(deterministic=True)
    params = init_params(build_model(learned), random_batch(2))
    batch = random_batch(2)._replace(video=random_batch(2).video[:, :, ::2, ::2])
    found = model.apply({"params": params}, batch.video, method="encode_video")
    own = override(learned, {"data.image_size": 8, "data.train_size": 0})
    table = params["video_encoder"]["positions"]
    resized = resize_grid(table, 1 + (8 // SMALL.model.video.patch_size) ** 2)
    video = params["video_encoder"] | {"positions": resized}
    expected = build_model(own).apply(
        {"params": params | {"video_encoder": video}}, batch.video, method="encode_video"
    )
    np.testing.assert_allclose(found.tokens, expected.tokens, rtol=1e-5, atol=1e-6)


def test_fixed_positions_of_a_smaller_grid_are_those_of_the_same_places():
    whole = sincos_positions(4, 4, 16).reshape(4, 4, 16)
    half = sincos_positions(2, 2, 16, full=(4, 4)).reshape(2, 2, 16)
    # A patch of the half-size picture covers four; its center is at 0.5 of theirs.
    frequencies = 1 / 10000 ** (np.arange(4) / 4)
    np.testing.assert_allclose(half[0, 0, :4], np.sin(0.5 * frequencies), rtol=1e-6)
    np.testing.assert_allclose(half[1, 0, 8:12], np.sin(2.5 * frequencies), rtol=1e-6)
    np.testing.assert_array_equal(sincos_positions(4, 4, 16, (4, 4)).reshape(4, 4, 16), whole)
    assert jnp.abs(half[0, 0] - whole[0, 0]).max() > 0.1
