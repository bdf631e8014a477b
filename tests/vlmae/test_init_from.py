"""Parameters of another run: what is taken over, resized, left out, and said about it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize

from vlmae.config_tree import override
from vlmae.models.video_language import build_model
from vlmae.state import fit_positions, merge_params

TEXT, TIME = "text_encoder/embeddings/position/embedding", "video_encoder/temporal/embedding"
GRID = "video_encoder/positions"


def params_of(changes: dict, seed: int = 0) -> dict:
    config = override(SMALL, changes)
    batch = random_batch()
    size = config.data.image_size
    if size != SMALL.data.image_size:
        batch = batch._replace(video=jnp.zeros((6, 2, size, size, 3), "uint8"))
    return randomize(init_params(build_model(config), batch, config.objectives), seed)


def test_everything_is_loaded_from_the_same_model():
    source, target = params_of({}), params_of({}, seed=1)
    merged, report = merge_params(target, source)
    jax.tree.map(np.testing.assert_array_equal, merged, source)
    assert len(report.loaded) == len(jax.tree.leaves(source))
    assert not any(report[1:])


def test_positions_are_resized_and_everything_else_is_named():
    learned = {"model.video.positions": "learned", "model.video.time_frames": 4}
    source = params_of(learned)
    changes = learned | {
        "data.image_size": 32,
        "model.text.max_len": 20,
        "model.video.time_frames": 7,
        "model.embed_dim": 4,
        "objectives.mvm": 0.0,
        "model.fusion.depth": 2,
    }
    target = params_of(changes, seed=1)
    merged, report = merge_params(target, source)
    assert {entry.split(":")[0] for entry in report.resized} == {TEXT, TIME, GRID}
    assert f"{GRID}: (16, 16) in the source, (64, 16) in the model" in report.resized
    assert all(name.startswith("fusion/block_1/") for name in report.missing) and report.missing
    assert all(name.startswith("pixel_decoder/") for name in report.unused) and report.unused
    assert {entry.split(":")[0].split("/")[0] for entry in report.mismatched} == {
        "video_projection",
        "text_projection",
    }
    named = sum(len(part) for part in (report.loaded, *report[1:3], report.mismatched))
    assert named == len(jax.tree.leaves(target))
    assert f"  resized: {report.resized[0]}" in str(report)
    words = merged["text_encoder"]["embeddings"]["position"]["embedding"]
    old = source["text_encoder"]["embeddings"]["position"]["embedding"]
    new = target["text_encoder"]["embeddings"]["position"]["embedding"]
    np.testing.assert_array_equal(words, np.concatenate([old, new[12:]]))


def test_a_shorter_text_keeps_the_first_positions():
    source = np.arange(12.0).reshape(6, 2).astype("float32")
    np.testing.assert_array_equal(fit_positions(TEXT, source, np.zeros((4, 2))), source[:4])


@pytest.mark.parametrize(("name", "old", "new"), [(TIME, (5,), (9,)), (GRID, (4, 4), (8, 8))])
def test_a_linear_ramp_stays_one(name, old, new):
    """Interpolation moves between the old positions; away from the borders a ramp is kept."""
    places = np.indices(old, np.float32).reshape(len(old), -1).T
    fitted = fit_positions(name, places, np.zeros((np.prod(new), len(old)), np.float32))
    centers = (np.indices(new).reshape(len(new), -1).T + 0.5) * (np.array(old) / new) - 0.5
    inner = ((centers > 1) & (centers < np.array(old) - 2)).all(axis=1)
    assert inner.any()
    np.testing.assert_allclose(np.asarray(fitted)[inner], centers[inner], atol=0.1)


def test_only_positions_of_the_same_width_are_resized():
    assert fit_positions(TEXT, np.zeros((6, 2)), np.zeros((6, 3))) is None
    assert fit_positions("match_head/kernel", np.zeros((6, 2)), np.zeros((4, 2))) is None
