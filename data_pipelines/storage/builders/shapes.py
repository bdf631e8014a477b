"""The synthetic data set: a colored shape that moves one way and then another, as real H.264.

It needs no download, and everything that captions, questions and labels say is true by
construction. The two directions are told apart by their order only: a clip played backwards
shows another motion. The splits hold out combinations of attributes, never single attributes.
With several objects a caption has a sentence for each: long texts, of which every word counts.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw

from data_pipelines.media.video_writer import encode_video
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.records import Example, Question
from data_pipelines.storage.builders import base
from data_pipelines.storage.tasks import Task

COLORS = {
    "red": (225, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 235, 50),
    "green": (30, 170, 55),
    "cyan": (60, 225, 235),
    "blue": (45, 75, 240),
    "purple": (160, 45, 205),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADII = {"small": 0.1, "large": 0.21}  # of the frame's side
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)
# Turns by a right angle only: back along the same line would look the same played backwards.
MOTIONS = tuple(
    (first, second)
    for first, second in itertools.permutations(DIRECTIONS, 2)
    if DIRECTIONS[first][0] * DIRECTIONS[second][0] == 0
    and DIRECTIONS[first][1] * DIRECTIONS[second][1] == 0
)

# The first template is the canonical caption; evaluation uses it alone.
TEMPLATES = (
    "a {size} {color} {shape} moves {first}, then {second}",
    "the {size} {color} {shape} goes {first} before it goes {second}",
    "first {first} and then {second}: a {size} {color} {shape} in motion",
)
SPLIT_CODES = {"train": 0, "val": 1, "test": 2}
NUM_FRAMES = 16
FPS = 8
_SUPERSAMPLING = 4


@dataclasses.dataclass(frozen=True)
class Combination:
    """Everything that is said about a clip."""

    color: str
    shape: str
    size: str
    first: str  # direction of the first half
    second: str  # direction of the second half

    def __str__(self) -> str:
        return f"{self.size}-{self.color}-{self.shape}-{self.first}-{self.second}"


class Shapes(base.VideoTextBuilder):
    """Moving shapes; `frame_size` is the height and width of a frame in pixels."""

    version = "1.1.0"  # since then each clip is asked how it moves, too

    def __init__(
        self,
        *,
        num_train: int = 3000,
        num_val: int = 128,
        num_test: int = 128,
        frame_size: int = 64,
        num_objects: int = 1,
        seed: int = 0,
        **kwargs,
    ):
        """Take sizes; `num_val` and `num_test` are also the numbers of held-out combinations.

        `num_objects` move in each clip; the questions are asked of a single one only.
        """
        super().__init__(**kwargs)
        if num_objects < 1:
            raise UserError(f"shapes: num_objects={num_objects} is less than 1")
        self.num_objects = num_objects
        self.num_clips = {"train": num_train, "val": num_val, "test": num_test}
        self.frame_size = frame_size
        self.seed = seed

    def examples(self) -> dict[str, Iterator[Task]]:
        """Return tasks to draw the clips of each split."""
        return {split: self._tasks(split, count) for split, count in self.num_clips.items()}

    def _tasks(self, split: str, count: int) -> Iterator[Task]:
        self._combinations(split)  # too many are held out: raises before anything is drawn
        for index in range(count):
            yield Task(path=f"{split}/{index}", size=self.frame_size**2)  # about their bytes

    def load(self, task: Task) -> Example:
        """Draws a clip; test and val have one clip of each held-out combination."""
        split, index = task.path.split("/")
        combinations = self._combinations(split)
        # A generator for each clip: any process draws any clip, alone and alike.
        rng = np.random.default_rng((self.seed, SPLIT_CODES[split], int(index)))
        others = rng.integers(len(combinations), size=self.num_objects - 1)
        objects = [combinations[i] for i in (int(index) % len(combinations), *others)]
        return make_example(objects, split, int(index), self.frame_size, rng)

    def _combinations(self, split: str) -> list[Combination]:
        held_out = self.num_clips["test"], self.num_clips["val"]
        return split_combinations(*held_out, self.seed)[split]


class Shapes3(Shapes):
    """Clips of three shapes, each with a sentence of the caption."""

    name = "shapes_3"

    def __init__(self, *, num_objects: int = 3, **kwargs):
        """See `Shapes`."""
        super().__init__(num_objects=num_objects, **kwargs)


@functools.cache
def split_combinations(num_test: int, num_val: int, seed: int) -> dict[str, list[Combination]]:
    """Shuffle and divide all 768 combinations; training gets those that test and val leave.

    Raises:
      UserError: fewer than half of the combinations would be left for training.
    """
    parts = itertools.product(COLORS, SHAPES, RADII, MOTIONS)
    everything = [Combination(*names, *motion) for *names, motion in parts]
    num_held_out = num_test + num_val
    if num_held_out > len(everything) // 2:
        raise UserError(
            f"shapes: num_val + num_test = {num_held_out} is more than half of the "
            f"{len(everything)} combinations"
        )
    # Combinations are held out, not clips: a model must put known words together anew.
    order = np.random.default_rng(seed).permutation(len(everything))
    shuffled = [everything[i] for i in order]
    return {
        "test": shuffled[:num_test],
        "val": shuffled[num_test:num_held_out],
        "train": shuffled[num_held_out:],
    }


def make_example(
    objects: Sequence[Combination],
    split: str,
    index: int,
    frame_size: int,
    rng: np.random.Generator,
) -> Example:
    """Draw one clip, with its captions, labels, and the questions about a single object."""
    frames = render_clip(objects, frame_size, rng)
    words = [dataclasses.asdict(one) for one in objects]
    templates = TEMPLATES if split == "train" else TEMPLATES[:1]
    return Example(
        media=encode_video(frames, FPS),
        media_type="video",
        captions=["; ".join(template.format(**one) for one in words) for template in templates],
        match_id="+".join(map(str, objects)),
        source=f"shapes/{split}/{index}",
        questions=make_questions(objects[0]) if len(objects) == 1 else [],
        labels=sorted({word for one in words for word in one.values()}),
    )


def make_questions(combination: Combination) -> list[Question]:
    """Ask six questions; only the three about motion need more than one frame, and their order."""
    first, second = combination.first, combination.second
    return [
        Question("what color is the shape?", combination.color, "color"),
        Question("which shape is it?", combination.shape, "shape"),
        Question("how big is the shape?", combination.size, "size"),
        Question("where does it move first?", first, "first_direction"),
        Question("where does it move in the end?", second, "second_direction"),
        Question("how does it move?", f"{first}, then {second}", "motion"),
    ]


def render_clip(
    objects: Sequence[Combination], frame_size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "t h w 3"]:
    """Draw the frames of a clip; `rng` sets paths, background and a slight change of sizes.

    Later objects cover earlier ones.
    """
    paths = []
    for one in objects:
        radius = frame_size * RADII[one.size] * rng.uniform(0.92, 1.08)
        paths.append((radius, make_path(one, frame_size, radius, rng)))
    background = make_background(frame_size, rng)
    frames = np.empty((NUM_FRAMES, frame_size, frame_size, 3), np.uint8)
    for number, frame in enumerate(frames):
        picture = background
        for one, (radius, centers) in zip(objects, paths, strict=True):
            color = np.asarray(COLORS[one.color], np.float32)
            cover = shape_cover(one.shape, centers[number], radius, frame_size)[..., None]
            picture = picture + cover * (color - picture)
        frame[:] = np.rint(picture)
    return frames


def make_path(
    combination: Combination, frame_size: int, radius: float, rng: np.random.Generator
) -> Float32[np.ndarray, "t 2"]:
    """Centers (x, y) in pixels: two legs at constant speed, each about half of the clip.

    The box around the path, not its start, is placed uniformly in the frame: where the shape is
    then says as little as it can about where it goes.
    """
    lengths = frame_size * rng.uniform(0.2, 0.28, size=2)
    legs = np.array([DIRECTIONS[combination.first], DIRECTIONS[combination.second]])
    corners = np.concatenate([np.zeros((1, 2)), np.cumsum(legs * lengths[:, None], axis=0)])
    # Not always in the middle, or the number of a frame would tell its direction.
    turn = rng.uniform(0.45, 0.55)
    shares = np.interp(np.linspace(0, 1, NUM_FRAMES), [0, turn, 1], [0, 1, 2])
    path = np.stack([np.interp(shares, [0, 1, 2], axis) for axis in corners.T], axis=-1)
    margin = radius + 1
    lowest = margin - path.min(axis=0)
    highest = frame_size - margin - path.max(axis=0)
    return (path + rng.uniform(lowest, highest)).astype(np.float32)


def make_background(frame_size: int, rng: np.random.Generator) -> Float32[np.ndarray, "h w 3"]:
    """Return a dark, slightly tinted gradient in a random direction."""
    base_color = rng.uniform(25, 60) + rng.uniform(-10, 10, size=3)
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:frame_size, :frame_size] / frame_size - 0.5
    slope = rng.uniform(0, 25) * (math.cos(angle) * x + math.sin(angle) * y)
    return (base_color + slope[..., None]).clip(0, 255).astype(np.float32)


def shape_cover(
    shape: str, center: Float32[np.ndarray, " 2"], radius: float, frame_size: int
) -> Float32[np.ndarray, "h w"]:
    """Return the covered share of each pixel, 0 to 1 (anti-aliased by supersampling)."""
    # Only a window around the shape is drawn at high resolution.
    side = 2 * math.ceil(radius) + 3
    left, top = (math.floor(value) - side // 2 for value in center)
    window = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    middle = (np.asarray(center, np.float64) - (left, top)) * _SUPERSAMPLING
    _draw_shape(ImageDraw.Draw(window), shape, middle, radius * _SUPERSAMPLING)
    small = window.reduce(_SUPERSAMPLING)
    frame = Image.new("L", (frame_size, frame_size))
    frame.paste(small, (left, top))
    return np.asarray(frame, np.float32) / 255


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, middle: np.ndarray, radius: float) -> None:
    box = [*(middle - radius).tolist(), *(middle + radius).tolist()]
    if shape == "circle":
        draw.ellipse(box, fill=255)
        return
    if shape == "ring":
        draw.ellipse(box, outline=255, width=round(radius * 0.4))
        return
    points = middle + radius * _polygon(shape)
    draw.polygon(points.ravel().tolist(), fill=255)


@functools.cache
def _polygon(shape: str) -> np.ndarray:
    """Return corners (x, y) within the unit circle."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85
    if shape == "triangle":
        return _on_circle(3)
    if shape == "star":
        return _on_circle(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    arm = np.array([(-0.3, -1), (0.3, -1), (0.3, -0.3)])  # of a cross; the others are turned
    quarter_turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])


def _on_circle(num_points: int) -> np.ndarray:
    """Return points on the unit circle, the first at the top, clockwise."""
    angles = 2 * math.pi * np.arange(num_points) / num_points
    return np.stack([np.sin(angles), -np.cos(angles)], axis=-1)
