"""The peer of the step benchmark is the same model: equal losses and gradients, part by part."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import sides, step
from experiments.benchmarks.cost import VOCAB_SIZE
from experiments.benchmarks.own_process import in_own_process
from experiments.benchmarks.peer import Peer
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.models.video_language import build_model
from vlmae.training.objectives import compute_losses
from vlmae.training.step import abstract_batch, make_init, random_batch

TINY = {
    "data.image_size": 64,
    "model.video.width": 48,
    "model.video.depth": 4,
    "model.video.num_heads": 4,
    "model.video.mlp_dim": 80,
    "model.video.sparsify.stages": (1, 2),
    "model.text.width": 48,
    "model.text.depth": 2,
    "model.text.num_heads": 4,
    "model.text.mlp_dim": 64,
    "model.pixel_decoder.width": 32,
    "model.pixel_decoder.depth": 2,
    "model.pixel_decoder.num_heads": 2,
}


def tiny(name: str, batch_size: int = 4) -> ExperimentConfig:
    return override(sides.variant_config("S", 2, name, batch_size), TINY)


@pytest.fixture
def without_noise(monkeypatch):
    """Training as it is, but what the peer is not given, it does not need."""
    monkeypatch.setattr(jax.random, "gumbel", lambda key, shape: np.zeros(shape, np.float32))


QUICK = "SMAUG, masked 0.65"  # the others take a minute each to compile


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == QUICK else pytest.mark.slow)
        for name in sides.VARIANTS
    ],
)
def test_peer_has_our_losses_and_gradients(name, without_noise, monkeypatch):
    config = tiny(name)
    batch = random_batch(abstract_batch(config), VOCAB_SIZE)
    batch = batch._replace(text_mask=np.arange(32) < np.array([[32], [9], [20], [3]]))
    batch = jax.tree.map(jnp.asarray, batch)
    params = jax.jit(make_init(config))(0).params
    key, model = jax.random.key(1), build_model(config, deterministic=False)
    noise = jax.random.uniform(jax.random.key(2), (4, 2, 16))
    monkeypatch.setattr("vlmae.models.pixel_decoder.uniform_noise", lambda module, shape: noise)

    def run(params):
        variables = {"params": params}
        drawn = model.apply(variables, batch, key, config.objectives, method=sides.draw, rngs=RNGS)
        value = model.apply(
            variables, batch, key, config.objectives, method=compute_losses, rngs=RNGS
        ).value
        return value, drawn

    (ours, drawn), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    peer = Peer(config, jax.device_get(params))
    theirs = peer(sides.to_torch_batch(batch, drawn | {"paint_noise": noise}))
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)

    expected = dict(Peer(config, jax.device_get(gradients)).named_parameters())
    largest = max(x.detach().abs().max() for x in expected.values())
    for name, parameter in peer.named_parameters():
        if parameter.requires_grad:
            wanted, found = expected[name].detach(), parameter.grad
            tolerance = 1e-4 * wanted.abs().max() + 1e-7 * largest
            np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance, err_msg=name)


def test_both_sides_ask_nothing_where_wrong_captions_are_too_few():
    """MCM wants three of them; two rows have one each."""
    step.check_losses(*sides.losses_of(tiny("MuLTI", batch_size=2)))


RNGS = {"dropout": jax.random.key(3), "noise": jax.random.key(4)}


def test_benchmark_refuses_another_model():
    step.check_losses(2.0, 2.0 + 1e-5)
    with pytest.raises(ValueError, match="not the same model"):
        step.check_losses(2.0, 2.1)
    with pytest.raises(ValueError, match="not the same model"):
        step.check_losses(float("nan"), 2.0)


def test_ratios_compare_steps_of_one_round():
    secs = {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 2.0, 4.0]}
    measured = {"secs": secs, "peer": "compiled", "gib": {"ours": 1.5, "peer": 2.0}}
    row = step.row("dense", "S", 4, 8, measured)
    assert (row["ratio"], row["ratio_range"]) == (1.0, [1.0, 2.0])
    assert (row["clips_per_sec"], row["peer_clips_per_sec"]) == (4.0, 4.0)
    line = "| S/16 | 4 | dense | 2.00 | 4.00 | 4.00 (compiled) | 1.00 (1.00-2.00) | 1.50 | 2.00 |"
    assert step.format_table([row]).splitlines()[2:] == [line]


def test_a_killed_process_costs_one_line(monkeypatch, tmp_path, capsys):
    def measure(config: ExperimentConfig, *_: object) -> dict:
        if not config.model.video.mask.ratio:
            in_own_process(os._exit, 1)
        gib = {"ours": 1.5, "peer": 2.0}
        return {"secs": {"ours": [1.0], "peer": [2.0]}, "peer": "eager", "gib": gib}

    monkeypatch.setattr(step, "measure", measure)
    step.main(("S",), (4,), ("MuLTI", "SMAUG"), out_dir=tmp_path)
    report = json.loads((tmp_path / "step.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["SMAUG"]
    assert report["left_out"] == ["S/16, 4 frames, MuLTI"]
    assert "left out, 1 of 2: S/16, 4 frames, MuLTI" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("free", [2**50, 0])
def test_measures_a_step_of_both(free, monkeypatch):
    """In processes of their own, together and one after the other."""
    monkeypatch.setattr(step, "free_bytes", lambda: free)
    measured = step.measure(tiny("SMAUG"), rounds=2)
    assert measured["side_by_side"] == (free > 0) and measured["peer"] == "eager"
    assert all(len(x) == 2 and min(x) > 0 for x in measured["secs"].values())
    parameters = 16 * 1.5e6 / 2**30  # of about so many, their gradients and two moments
    assert all(parameters < peak < 1 for peak in measured["gib"].values()), measured["gib"]
