"""Crops, flips and resizing of clips: uint8 in and out, the same for all frames of a clip."""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_CROP_TRIES = 100  # of the views of 854 x 480 at scale 0.5, ten tries leave 17 % without a crop
_LOG_ASPECT_RATIOS = np.log((3 / 4, 4 / 3))


def train_view(
    video: UInt8[np.ndarray, "t h w 3"],
    size: int,
    rng: np.random.Generator,
    *,
    min_crop_scale: float,
    flip: bool,
) -> UInt8[np.ndarray, "t {size} {size} 3"]:
    """Take a random crop (unless `min_crop_scale` is 1), and a mirror image half of the time.

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
    """Resize the short side to `size`, and take the center square."""
    return crop_resize(video, center_box(*video.shape[1:3]), size)


def center_box(height: int, width: int) -> Box:
    """Return the largest square in the middle of a frame."""
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(height: int, width: int, min_scale: float, rng: np.random.Generator) -> Box:
    """Draw a box of random area, aspect ratio and place (RandomResizedCrop, Szegedy et al. 2015).

    Area and aspect are drawn until the box fits. In a long frame no box of `min_scale` may fit; the
    last aspect then takes the largest box that does, at a random place (ours: the bases take the
    center, which would be the only view of 854 x 480 at scale 0.8).
    """
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(min_scale, 1)
        aspect = math.exp(rng.uniform(*_LOG_ASPECT_RATIOS))
        box_width, box_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if box_width <= width and box_height <= height:
            break
    else:
        box_width = min(width, height * aspect)
        box_height = box_width / aspect
    left = rng.uniform(0, width - box_width)
    top = rng.uniform(0, max(0.0, height - box_height))  # rounding may pass the edge
    return left, top, left + box_width, top + box_height


def crop_resize(
    video: UInt8[np.ndarray, "t h w 3"], box: Box, size: int
) -> UInt8[np.ndarray, "t {size} {size} 3"]:
    """Crop and resize every frame bicubically in one step; untouched if nothing changes."""
    if video.shape[1:3] == (size, size) and box == (0, 0, size, size):
        return video
    resized = np.empty((len(video), size, size, 3), np.uint8)
    for frame, out in zip(video, resized, strict=True):
        image = Image.fromarray(frame)
        out[:] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return resized
