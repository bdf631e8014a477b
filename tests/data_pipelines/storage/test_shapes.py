import dataclasses
import itertools

import numpy as np
import pytest

from data_pipelines.media import decode
from data_pipelines.storage.builders import shapes


@pytest.fixture(scope="module")
def splits():
    return shapes.split_combinations(num_test=128, num_val=128, seed=0)


def example_of(combination, seed=0):
    return shapes.make_example([combination], "test", 0, 64, np.random.default_rng(seed))


def saturated(frames, combination):
    """How close each pixel is to the shape's color rather than to the background."""
    background = np.median(frames, axis=(1, 2), keepdims=True)
    away = np.abs(frames - background).sum(-1)
    return away > 0.5 * away.max()


def test_motions_are_ordered_pairs_that_are_not_opposite():
    assert len(shapes.MOTIONS) == 8
    for first, second in shapes.MOTIONS:
        assert np.dot(shapes.DIRECTIONS[first], shapes.DIRECTIONS[second]) == 0


def test_splits_hold_out_combinations_but_no_attribute(splits):
    assert [len(splits[name]) for name in ("train", "val", "test")] == [512, 128, 128]
    everything = [*splits["train"], *splits["val"], *splits["test"]]
    assert len(set(everything)) == 768
    seen = {
        (a, b) for item in splits["train"] for a, b in itertools.combinations(attributes(item), 2)
    }
    wanted = {(a, b) for item in everything for a, b in itertools.combinations(attributes(item), 2)}
    assert seen == wanted


def attributes(item):
    return item.color, item.shape, item.size, (item.first, item.second)


def test_the_same_seed_gives_the_same_bytes(splits):
    first, second, other = (example_of(splits["test"][0], seed) for seed in (1, 1, 2))
    assert first == second
    assert other.media != first.media and other.captions == first.captions


@pytest.mark.parametrize("index", range(12))
def test_what_is_said_is_what_is_shown(splits, index):
    combination = splits["train"][index * 7]
    example = example_of(combination, seed=index)
    frames = decode.decode_frames(example.media, np.arange(16) / 8).astype(np.float32)
    mask = saturated(frames, combination)
    # The color: the center of mass of the covered pixels' color is nearest to the named one.
    shown = np.median(frames[mask], axis=0)
    distances = {name: np.abs(shown - color).sum() for name, color in shapes.COLORS.items()}
    assert min(distances, key=distances.get) == combination.color
    # The size: height and width of what is covered; 10 pixels part small squares and large stars.
    radius = max(np.ptp(np.nonzero(mask[0])[axis]) + 1 for axis in (0, 1)) / 2
    assert (radius > 64 * 0.156) == (combination.size == "large")
    # The directions: how the center of what is covered moves in each half.
    centers = np.array([np.mean(np.nonzero(m)[::-1], axis=1) for m in mask])
    for start, end, direction in ((0, 6, combination.first), (9, 15, combination.second)):
        moved = centers[end] - centers[start]
        assert np.dot(moved, shapes.DIRECTIONS[direction]) > 5
        assert abs(np.dot(moved, shapes.DIRECTIONS[direction][::-1])) < 1.5
    words = example.captions[0].replace(",", "").split()
    assert words[-3:] == [combination.first, "then", combination.second]
    assert words[1:4] == [combination.size, combination.color, combination.shape]


def test_shapes_look_different():
    center = np.array([32.3, 31.8], np.float32)
    covers = [shapes.shape_cover(name, center, 6.0, 64) for name in shapes.SHAPES]
    for a, b in itertools.combinations(covers, 2):
        assert np.abs(a - b).sum() > 15
    for cover in covers:
        assert cover.min() == 0 and cover.max() == 1
        y, x = np.mgrid[:64, :64]
        middle = (cover * x).sum() / cover.sum(), (cover * y).sum() / cover.sum()
        np.testing.assert_allclose(middle, center - 0.5, atol=0.7)


def test_the_shape_stays_inside_the_frame(splits):
    rng = np.random.default_rng(0)
    for combination in splits["train"][:200]:
        path = shapes.make_path(combination, 64, 10.0, rng)
        assert path.shape == (16, 2) and path.min() >= 10 and path.max() <= 54


def test_the_place_says_little_about_the_motion(splits):
    """Guessing the motion from where the first frame shows the shape stays far from certain."""
    rng = np.random.default_rng(0)
    items = splits["train"] * 6
    radii = [64 * shapes.RADII[item.size] for item in items]
    starts = np.array(
        [shapes.make_path(i, 64, r, rng)[0] for i, r in zip(items, radii, strict=True)]
    )
    cells = (starts // 8).astype(int) @ (1, 8)
    motions = np.array([shapes.MOTIONS.index((item.first, item.second)) for item in items])
    half = len(items) // 2
    votes = np.zeros((64, 8))
    np.add.at(votes, (cells[:half], motions[:half]), 1)
    accuracy = (votes.argmax(axis=1)[cells[half:]] == motions[half:]).mean()
    assert accuracy < 0.4  # chance is 0.125


def test_annotations_agree(splits):
    combination = splits["test"][3]
    example = example_of(combination)
    answers = {question.kind: question.answer for question in example.questions}
    words = dataclasses.asdict(combination)
    assert answers.pop("motion") == f"{combination.first}, then {combination.second}"
    assert answers["first_direction"] == words.pop("first")
    assert answers["second_direction"] == words.pop("second")
    assert {kind: answers[kind] for kind in words} == words
    assert set(example.labels) == set(answers.values())
    assert example.match_id == str(combination) and len(example.captions) == 1


def test_several_objects(splits, tmp_path):
    """Each is seen in its color and has its sentence."""
    red, blue = (next(x for x in splits["train"] if x.color == c) for c in ("red", "blue"))
    example = shapes.make_example([red, blue], "test", 0, 64, np.random.default_rng(0))
    first, second = example.captions[0].split("; ")
    assert [first] == example_of(red).captions and [second] == example_of(blue).captions
    assert example.match_id == f"{red}+{blue}" and not example.questions
    frames = decode.decode_frames(example.media, np.arange(16) / 8).astype(np.float32)
    for color in ("red", "blue"):
        away = np.abs(frames - shapes.COLORS[color]).sum(-1)
        assert (away < 120).any(axis=(1, 2)).mean() > 0.8, "but where another covers it"

    builder = shapes.Shapes3(data_dir=tmp_path, num_train=4, num_val=2, frame_size=32)
    tasks = list(builder.examples()["train"])
    loaded = [builder.load(task) for task in tasks]
    assert all(len(example.captions[0].split("; ")) == 3 for example in loaded)
    assert loaded == [builder.load(task) for task in tasks]
    with pytest.raises(ValueError, match="num_objects=0"):
        shapes.Shapes(data_dir=tmp_path, num_objects=0)


def test_too_many_held_out_combinations_raise():
    with pytest.raises(ValueError, match="more than half of the 768"):
        shapes.split_combinations(300, 128, 0)
