"""The picture of what the model does: hidden patches are gray, chosen frames have a border."""

import jax
import numpy as np
import pytest
from helpers import SMALL, init_params, random_batch, randomize
from PIL import Image

from vlmae.config.tree import override
from vlmae.figures import clip_figure as p
from vlmae.figures.answer_page import MARGIN, MIN_FRAME_SIDE, TITLE_HEIGHT
from vlmae.figures.explain import load_pair
from vlmae.models.video_language import build_model

CONFIG = override(
    SMALL,
    {
        "model.video.depth": 2,
        "model.video.sparsify.keep_rate": 0.5,
        "model.video.sparsify.stages": (0, 1),
        "model.selector.kind": "mlp",
    },
)
RECONSTRUCTION = "reconstruction\n(seen patches pasted in)"
CAPTIONS = ["a red circle", "a blue star"]


@pytest.fixture(scope="module")
def traced():
    """Two clips of four frames, and the parameters that saw them."""
    batch = random_batch(2, frames=4)
    params = randomize(jax.jit(lambda: init_params(build_model(CONFIG), batch))())
    return batch, params, p.trace(CONFIG, params, batch)


def gray(frames: np.ndarray) -> np.ndarray:
    """[t h w 3] -> True for each 4 x 4 patch that is hidden, [t n]."""
    patches = frames.reshape(len(frames), 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(len(frames), 16, -1)
    return (patches == p.HIDDEN_GRAY).all(axis=-1)


def test_rows_show_what_each_stage_leaves(traced):
    batch, _, trace = traced
    rows = dict(p.picture_rows(CONFIG, trace))
    assert list(rows) == [
        "frames",
        "visible: 5 of 16",
        "after block 0: 4",
        "after block 1: 3",
        RECONSTRUCTION,
    ]
    np.testing.assert_array_equal(rows["frames"], batch.video)
    np.testing.assert_array_equal(gray(rows["visible: 5 of 16"][0]), trace.removed_mask[0])
    for stage, label in enumerate(("after block 0: 4", "after block 1: 3"), start=1):
        for t in range(4):
            left = {int(i) for i in trace.stage_patch_ids[stage][1, t] if i >= 0}
            assert set(np.flatnonzero(~gray(rows[label][1])[t])) == left


def test_the_reconstruction_keeps_what_was_seen(traced):
    batch, _, trace = traced
    painted = dict(p.picture_rows(CONFIG, trace))[RECONSTRUCTION]
    removed = trace.removed_mask.reshape(2, 4, 4, 4).repeat(4, axis=2).repeat(4, axis=3)
    np.testing.assert_array_equal(painted[~removed], np.asarray(batch.video)[~removed])
    assert (painted[removed] != np.asarray(batch.video)[removed]).mean() > 0.9


def test_chosen_frames_have_a_border_and_others_have_none(traced):
    _, _, trace = traced
    rows = p.picture_rows(CONFIG, trace)
    image = np.asarray(p.draw_clip(0, CAPTIONS[0], rows, trace))
    side = MIN_FRAME_SIDE
    top = TITLE_HEIGHT + side + MARGIN  # the second strip
    corners = [image[top, p.LABEL_WIDTH + i * (side + MARGIN)] for i in range(4)]
    bordered = {i for i, corner in enumerate(corners) if (corner == p.SELECTED_COLOR).all()}
    assert bordered == set(trace.choice.frames[0].tolist()) and len(bordered) == 2


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_scores_are_read_on_frames_of_any_brightness(shade):
    """White on black, whatever is behind."""
    frames = [np.full((16, 16, 3), shade, np.uint8)] * 2
    scores = np.array([0.25, -1.5], np.float32)
    plain, scored = (np.asarray(p.strip("", frames, scores=s)) for s in (None, scores))
    for i in range(2):
        left = p.LABEL_WIDTH + i * (MIN_FRAME_SIDE + MARGIN)
        box = scored[:, left : left + MIN_FRAME_SIDE]
        changed = (box != plain[:, left : left + MIN_FRAME_SIDE]).any(axis=2)
        ink = (box >= 200).all(axis=2) & (changed | (shade == 255))
        rows, columns = np.nonzero((box <= 40).all(axis=2))
        if shade:  # on black the backing is no change
            assert len(rows) > 200, "a backing"
            inside = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert inside.sum() > 20, "letters within it"
        else:
            assert ink.sum() > 20


def test_without_mask_stages_selector_and_decoder_only_frames_are_left(traced):
    batch, params, _ = traced
    plain = override(
        SMALL, {"model.video.depth": 2, "model.video.mask.scheme": "none", "objectives.mvm": 0.0}
    )
    rows = p.picture_rows(plain, p.trace(plain, params, batch))
    assert [label for label, _ in rows] == ["frames"]


def test_the_picture_is_saved(traced, tmp_path):
    batch, params, _ = traced
    p.save_picture(CONFIG, params, batch, CAPTIONS, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == (
            p.LABEL_WIDTH + 4 * (MIN_FRAME_SIDE + MARGIN),
            2 * (TITLE_HEIGHT + 6 * (MIN_FRAME_SIDE + MARGIN)),
        )


def test_any_clip_and_caption_can_be_explained(run_tiny, tiny_data_dir, tmp_path, capsys):
    from data_pipelines.schema.config import SourceConfig
    from data_pipelines.storage.stored import open_source
    from vlmae.config.experiment import load_config
    from vlmae.figures.explain import explain

    _, _, workdir = run_tiny("--train.steps", "1", "--train.save-every-steps", "1")
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(open_source(SourceConfig("shapes", "test"), str(tiny_data_dir))[0]["media"])
    explain(workdir, clip, "a small red circle moves left, then up", tmp_path / "out.png")
    assert "step 1: written to" in capsys.readouterr().out
    assert (tmp_path / "out.png").stat().st_size > 1000

    config = load_config(workdir / "config.json")
    batch = load_pair(config, workdir / "tokenizer", clip, "red circle")
    assert batch.video.shape == (1, 2, 16, 16, 3) and batch.text_mask.sum() >= 4
    (tmp_path / "no_clip.mp4").write_text("words")
    with pytest.raises(ValueError, match=r"no_clip\.mp4"):
        load_pair(config, workdir / "tokenizer", tmp_path / "no_clip.mp4", "red circle")
    with pytest.raises(ValueError, match="the caption is empty"):
        load_pair(config, workdir / "tokenizer", clip, " ")
