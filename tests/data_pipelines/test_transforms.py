import numpy as np
import pytest
from PIL import Image

from data_pipelines import transforms


@pytest.fixture
def video():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(frame).resize((48, 36))) for frame in small])


def test_eval_view_is_resize_and_center_crop(video):
    frame = Image.fromarray(video[1]).crop((6, 0, 42, 36)).resize((24, 24), Image.BICUBIC)
    view = transforms.eval_view(video, 24)
    assert view.dtype == np.uint8 and view.shape == (3, 24, 24, 3)
    # At the edge the resized box, unlike the cut one, still sees the pixels next to it.
    np.testing.assert_array_equal(view[1, :, 3:-3], np.asarray(frame)[:, 3:-3])


def test_nothing_to_do_returns_the_input(video):
    square = np.ascontiguousarray(video[:, :, :36])
    assert transforms.eval_view(square, 36) is square
    rng = np.random.default_rng(0)
    assert transforms.train_view(square, 36, rng, min_crop_scale=1, flip=False) is square


def test_all_frames_get_the_same_view(video):
    still = np.repeat(video[:1], 4, axis=0)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        view = transforms.train_view(still, 16, rng, min_crop_scale=0.3, flip=True)
        assert view.shape == (4, 16, 16, 3) and view.flags.c_contiguous
        assert (view == view[:1]).all()


def test_half_of_the_clips_are_mirrored(video):
    plain = transforms.eval_view(video, 36)
    rng = np.random.default_rng(0)
    views = [transforms.train_view(video, 36, rng, min_crop_scale=1, flip=True) for _ in range(200)]
    mirrored = [np.array_equal(view, plain[:, :, ::-1]) for view in views]
    assert all(m or np.array_equal(view, plain) for m, view in zip(mirrored, views, strict=True))
    assert 70 < sum(mirrored) < 130


def test_views_depend_on_the_generator_alone(video):
    def view(seed):
        rng = np.random.default_rng(seed)
        return transforms.train_view(video, 16, rng, min_crop_scale=0.3, flip=True)

    np.testing.assert_array_equal(view(3), view(3))
    assert not np.array_equal(view(3), view(4))


def test_random_boxes_keep_area_aspect_and_bounds():
    rng = np.random.default_rng(0)
    boxes = np.array([transforms.random_box(90, 120, 0.4, rng) for _ in range(500)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 120 and bottom.max() <= 90
    width, height = right - left, bottom - top
    share, aspect = width * height / (90 * 120), width / height
    assert 0.4 <= share.min() < 0.45 and 0.9 < share.max() <= 1
    assert 0.75 - 1e-9 <= aspect.min() and aspect.max() <= 4 / 3 + 1e-9
    assert left.std() > 5 and top.std() > 5


def test_frames_too_long_for_any_box_give_the_center():
    box = transforms.random_box(10, 1000, 0.9, np.random.default_rng(0))
    assert box == (495, 0, 505, 10)
