import functools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy import stats

from data_pipelines.media import transforms


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


def psnr(frames, others) -> float:
    """Peak signal-to-noise ratio in dB."""
    return 10 * np.log10(255**2 / np.mean((frames.astype(float) - others) ** 2))


def test_what_has_the_size_is_cropped_alone(video):
    """As Pillow does it, too."""
    frame = Image.fromarray(video[1]).resize((36, 36), Image.BICUBIC, box=(6, 0, 42, 36))
    np.testing.assert_array_equal(transforms.eval_view(video, 36)[1], np.asarray(frame))
    square = np.ascontiguousarray(video[:, :, :36])
    assert np.shares_memory(transforms.eval_view(square, 36), square)
    rng = np.random.default_rng(0)
    view = transforms.train_view(square, 36, rng, min_crop_scale=1, flip=False)
    np.testing.assert_array_equal(view, square)


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
    view = functools.partial(transforms.train_view, plain, 36, rng, min_crop_scale=1)
    views = [view(flip=True) for _ in range(2000)]
    mirrored = [np.array_equal(v, plain[:, :, ::-1]) for v in views]
    assert all(m or np.array_equal(v, plain) for m, v in zip(mirrored, views, strict=True))
    assert stats.binomtest(sum(mirrored), 2000).pvalue > 0.01
    assert all(np.array_equal(view(flip=False), plain) for _ in range(9))


@pytest.mark.parametrize(("width", "size"), [(48, 16), (36, 36)])
def test_a_training_view_is_a_random_box_of_all_frames(video, width, size):
    """Of frames that have the size already, too."""
    video = np.ascontiguousarray(video[:, :, :width])
    for seed in range(3):
        box = transforms.random_box(36, width, 0.3, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        view = transforms.train_view(video, size, rng, min_crop_scale=0.3, flip=False)
        for frame, expected in zip(view, video, strict=True):
            image = Image.fromarray(expected).crop([*map(round, box)])
            image = image.resize((size, size), Image.BICUBIC)
            assert psnr(frame, np.asarray(image)) > 40


@pytest.mark.parametrize("across", [0.5, 0.8, 1.05, 1.1, 1.2, 1.5, 2, 2.7, 4])
@pytest.mark.parametrize("down", [0.8, 1, 1.15, 1.7, 3])
@pytest.mark.parametrize("grain", [0, 14])
def test_resizing_is_antialiased_as_pillow_does_it(across, down, grain):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((480, 480), Image.BICUBIC), int)
    frame = np.clip(smooth + rng.integers(-grain, grain + 1, smooth.shape), 0, 255).astype(np.uint8)
    box = (10.0, 20.0, 10 + round(112 * across), 20 + round(112 * down))
    expected = Image.fromarray(frame).crop(box).resize((112, 112), Image.BICUBIC)
    for mirrored in (False, True):
        view = np.zeros((112, 112, 3), np.uint8)
        transforms.write_view(frame, transforms.View(box, mirrored), frame.shape[:2], view)
        view = view[:, ::-1] if mirrored else view
        assert psnr(view, np.asarray(expected)) > 40


def test_a_reduced_picture_gives_the_same_part():
    ramp = np.broadcast_to(np.arange(0, 256)[:, None, None], (256, 200, 3)).astype(np.uint8)
    small = ramp.reshape(128, 2, 100, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
    view = transforms.View((20.0, 40.0, 180.0, 240.0))
    whole, reduced = (np.zeros((80, 80, 3), np.uint8) for _ in range(2))
    transforms.write_view(ramp, view, (256, 200), whole)
    transforms.write_view(small, view, (256, 200), reduced)
    np.testing.assert_allclose(whole.astype(int), reduced, atol=2)


@pytest.mark.parametrize(
    ("box", "size", "reduction"),
    [((0, 0, 640, 480), 224, 2), ((0, 0, 640, 447), 224, 1), ((5, 5, 905, 905), 112, 8)],
)
def test_pictures_are_reduced_to_no_less_than_the_view(box, size, reduction):
    assert transforms.View(box).reduction(size) == reduction


def test_a_box_of_less_than_a_pixel_at_the_edge():
    frame, view = np.arange(48, dtype=np.uint8).reshape(4, 4, 3), np.zeros((2, 2, 3), np.uint8)
    transforms.write_view(frame, transforms.View((3.6, 3.6, 4.0, 4.0)), (4, 4), view)
    np.testing.assert_array_equal(view, np.broadcast_to(frame[3, 3], (2, 2, 3)))


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


def fitting_boxes(height, width, min_scale, count):
    """Independent oracle: shares of the area and aspects of the boxes that fit, by rejection."""
    rng = np.random.default_rng(123)
    share = rng.uniform(min_scale, 1, 2_000_000)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), share.size))
    area = share * height * width
    fits = (area * aspect <= width**2) & (area / aspect <= height**2)
    return share[fits][:count], aspect[fits][:count]


def split_boxes(boxes, height, width):
    """Share of the area, aspect, and place across and down, from 0 to 1 of the room there is."""
    left, top, right, bottom = np.array(boxes).T
    box_width, box_height = right - left, bottom - top
    places = left / (width - box_width), top / (height - box_height)
    return box_width * box_height / (height * width), box_width / box_height, *places


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(224, 224, 0.5), (480, 854, 0.5), (480, 854, 0.6), (854, 480, 0.5), (240, 320, 0.2)],
)
def test_boxes_are_distributed_as_those_that_fit(height, width, scale):
    rng = np.random.default_rng(0)
    boxes = [transforms.random_box(height, width, scale, rng) for _ in range(2000)]
    share, aspect, across, down = split_boxes(boxes, height, width)
    expected_share, expected_aspect = fitting_boxes(height, width, scale, 50_000)
    assert stats.ks_2samp(share, expected_share).pvalue > 0.01
    assert stats.ks_2samp(aspect, expected_aspect).pvalue > 0.01
    assert stats.kstest(across, "uniform").pvalue > 0.01
    assert stats.kstest(down, "uniform").pvalue > 0.01
    assert len({round(box[2] - box[0], 6) for box in boxes}) == 2000, "no view is a fallback"


@pytest.mark.parametrize(("height", "width"), [(480, 854), (854, 480), (10, 1000)])
def test_frames_too_long_for_any_box_get_the_largest_at_random_places(height, width):
    """At scale 0.8 no box of aspect 3/4 to 4/3 fits in 854 x 480."""
    rng = np.random.default_rng(0)
    boxes = [transforms.random_box(height, width, 0.8, rng) for _ in range(1000)]
    left, top, right, bottom = np.array(boxes).T
    assert left.min() >= 0 and top.min() >= 0
    assert right.max() <= width + 1e-9 and bottom.max() <= height + 1e-9
    along, short = (right - left, bottom - top), min(height, width)
    np.testing.assert_allclose(along[int(width > height)], short)
    logs = (np.log((right - left) / (bottom - top)) - np.log(3 / 4)) / np.log(16 / 9)
    place, room = (left, width - along[0]) if width > height else (top, height - along[1])
    assert stats.kstest(logs, "uniform").pvalue > 0.01, "the aspects are those that were asked for"
    assert stats.kstest(place / room, "uniform").pvalue > 0.01


@hypothesis.given(
    st.integers(8, 2000), st.integers(8, 2000), st.floats(0.01, 0.99), st.integers(0, 2**32)
)
def test_boxes_lie_in_the_frame_and_have_the_aspect(height, width, scale, seed):
    box = transforms.random_box(height, width, scale, np.random.default_rng(seed))
    left, top, right, bottom = box
    assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9
    aspect = (right - left) / (bottom - top)
    assert 3 / 4 - 1e-9 <= aspect <= 4 / 3 + 1e-9
    share = (right - left) * (bottom - top) / (height * width)
    whole = np.isclose(right - left, width) or np.isclose(bottom - top, height)
    assert scale <= share * (1 + 1e-9) or whole, "smaller only where no box fits"
    left, top, right, bottom = transforms.center_box(height, width)
    assert right - left == bottom - top == min(height, width)
    assert (left + right, top + bottom) == (width, height)


# --- colors


def by_pillow(frame, factors: dict) -> np.ndarray:
    """Pillow's enhancements one after the other, the operations of torchvision's ColorJitter."""
    kinds = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    image = Image.fromarray(frame)
    for name, factor in factors.items():
        image = kinds[name](image).enhance(factor)
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
def test_each_change_of_color_is_pillows(video, name, factor):
    for frame in video:
        ours = frame.copy()
        transforms.jitter_frame(ours, transforms.Jitter({name: factor}))
        difference = np.abs(ours - by_pillow(frame, {name: factor}))
        assert difference.max() <= 1
        assert factor != 1 or not difference.any()


def test_changes_of_color_are_made_in_their_order(video):
    """Each later one multiplies the level by which an earlier one may differ."""
    factors = {"contrast": 1.5, "brightness": 0.5, "saturation": 1.5}
    backwards = dict(reversed(factors.items()))
    ours = video[0].copy()
    transforms.jitter_frame(ours, transforms.Jitter(factors))
    assert np.abs(ours - by_pillow(video[0], factors)).max() <= 4
    assert np.abs(ours - by_pillow(video[0], backwards)).max() > 10


def test_factors_and_orders_are_uniform():
    rng = np.random.default_rng(0)
    drawn = [transforms.draw_jitter(0.4, rng).factors for _ in range(3000)]
    for name in ("brightness", "contrast", "saturation"):
        factors = [factors[name] for factors in drawn]
        assert stats.kstest(factors, stats.uniform(0.6, 0.8).cdf).pvalue > 0.01
    orders = [tuple(factors) for factors in drawn]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 0.01
