"""Crops, flips and resizing of clips: uint8 in and out, the same for all frames of a clip."""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_CROP_TRIES = 10
_ASPECT_RATIOS = (3 / 4, 4 / 3)


def train_view(
    video: UInt8[np.ndarray, "t h w 3"],
    size: int,
    rng: np.random.Generator,
    *,
    min_crop_scale: float,
    flip: bool,
) -> UInt8[np.ndarray, "t {size} {size} 3"]:
    """A random crop (unless `min_crop_scale` is 1), and a mirror image half of the time.

    The crop covers `min_crop_scale` to 1 of the area at an aspect ratio of 3/4 to 4/3, as
    Szegedy et al. 2015, section 6; one crop and one flip for all frames.
    """
    height, width = video.shape[1:3]
    box = center_box(height, width)
    if min_crop_scale < 1:
        box = random_box(height, width, min_crop_scale, rng)
    video = crop_resize(video, box, size)
    return np.ascontiguousarray(video[:, :, ::-1]) if flip and rng.random() < 0.5 else video


def eval_view(
    video: UInt8[np.ndarray, "t h w 3"], size: int
) -> UInt8[np.ndarray, "t {size} {size} 3"]:
    """The short side resized to `size`, and the center square of the result."""
    return crop_resize(video, center_box(*video.shape[1:3]), size)


def center_box(height: int, width: int) -> Box:
    """The largest square in the middle of a frame."""
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(height: int, width: int, min_scale: float, rng: np.random.Generator) -> Box:
    """A box of random area, aspect ratio and place; the center square if none of ten tries fits."""
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(min_scale, 1)
        aspect = math.exp(rng.uniform(*np.log(_ASPECT_RATIOS)))
        box_width, box_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if box_width <= width and box_height <= height:
            left = rng.uniform(0, width - box_width)
            top = rng.uniform(0, height - box_height)
            return left, top, left + box_width, top + box_height
    return center_box(height, width)


def crop_resize(
    video: UInt8[np.ndarray, "t h w 3"], box: Box, size: int
) -> UInt8[np.ndarray, "t {size} {size} 3"]:
    """The box of every frame, resized bicubically in one step; untouched if nothing changes."""
    if video.shape[1:3] == (size, size) and box == (0, 0, size, size):
        return video
    resized = np.empty((len(video), size, size, 3), np.uint8)
    for frame, out in zip(video, resized, strict=True):
        image = Image.fromarray(frame)
        out[:] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return resized
