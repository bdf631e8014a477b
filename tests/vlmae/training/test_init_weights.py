"""Parameters of another run: what is taken over, resized, left out, and said about it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize

from vlmae.config.tree import override
from vlmae.models.embeddings import resize_grid
from vlmae.models.video_language import build_model
from vlmae.training.init_weights import fit_positions, merge_params

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
    assert f"{GRID}: (17, 16) in the source, (65, 16) in the model" in report.resized
    assert all(name.startswith("fusion/block_1/") for name in report.missing) and report.missing
    assert all(name.startswith("pixel_decoder/") for name in report.unused) and report.unused
    assert {entry.split(":")[0].split("/")[0] for entry in report.mismatched} == {
        "video_projection",
        "text_projection",
    }
    named = sum(len(part) for part in (report.loaded, *report[1:3], report.mismatched))
    assert named == len(jax.tree.leaves(target))
    assert f"  resized: {report.resized[0]}" in str(report)
    # The largest parts of which nothing is used are a line each.
    assert f"  unused: pixel_decoder ({len(report.unused)} parameters)" in str(report)
    assert f"  missing: fusion/block_1 ({len(report.missing)} parameters)" in str(report)
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
    patch_ids = np.indices(old, np.float32).reshape(len(old), -1).T
    prefix = np.full((int(name == GRID), len(old)), 7.0, np.float32)  # of [CLS]
    initial = np.zeros((len(prefix) + np.prod(new), len(old)), np.float32)
    fitted = np.asarray(fit_positions(name, np.concatenate([prefix, patch_ids]), initial))
    np.testing.assert_array_equal(fitted[: len(prefix)], prefix)
    fitted = fitted[len(fitted) - np.prod(new) :]
    centers = (np.indices(new).reshape(len(new), -1).T + 0.5) * (np.array(old) / new) - 0.5
    inner = ((centers > 1) & (centers < np.array(old) - 2)).all(axis=1)
    assert inner.any()
    np.testing.assert_allclose(fitted[inner], centers[inner], atol=0.1)


def test_only_positions_of_the_same_width_are_resized():
    assert fit_positions(TEXT, np.zeros((6, 2)), np.zeros((6, 3))) is None
    assert fit_positions("match_head/kernel", np.zeros((6, 2)), np.zeros((4, 2))) is None


@pytest.mark.parametrize(("old", "new", "prefix"), [(5, 8, 1), (8, 5, 2), (3, 7, 0)])
def test_a_grid_is_resized_as_pytorch_does(old, new, prefix):
    torch = pytest.importorskip("torch")
    source = np.random.default_rng(0).normal(size=(prefix + old**2, 6)).astype("float32")
    grid = torch.from_numpy(source[prefix:]).reshape(1, old, old, 6).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic")
    expected = resized.permute(0, 2, 3, 1).reshape(new**2, 6).numpy()
    fitted = np.asarray(resize_grid(source, prefix + new**2))
    np.testing.assert_array_equal(fitted[:prefix], source[:prefix])
    np.testing.assert_allclose(fitted[prefix:], expected, atol=2e-6)
    assert resize_grid(source, prefix + new**2 + 1) is None
