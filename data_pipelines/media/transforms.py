"""Crops, flips, resizing and colors of clips: uint8 in and out, the same for all frames of a clip.

Training views are made by OpenCV, several times faster than Pillow's, from boxes of whole pixels.
Evaluation keeps Pillow's antialiased bicubic resizing, so that its figures stay comparable.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.media.jpeg import largest_reduction

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Frame = UInt8[np.ndarray, "h w 3"]

_CROP_TRIES = 100  # of the views of 854 x 480 at scale 0.5, ten tries leave 17 % without a crop
_LOG_ASPECT_RATIOS = np.log((3 / 4, 4 / 3))
# Of a side: from here on, the mean of an area is nearer to antialiased bicubic than cubic is.
_SHRINKS = 1.1
cv2.setNumThreads(0)  # the pipeline's workers are the parallelism


class View(NamedTuple):
    """A crop of the frames of a clip, mirrored or not."""

    box: Box
    mirrored: bool = False

    def reduction(self, size: int) -> int:
        """Return by how much sides may be divided while decoding, for a view of `size` pixels."""
        left, top, right, bottom = self.box
        return largest_reduction(bottom - top, right - left, size)


def train_view(
    video: UInt8[np.ndarray, "t h w 3"],
    size: int,
    rng: np.random.Generator,
    *,
    min_crop_scale: float,
    flip: bool,
) -> UInt8[np.ndarray, "t {size} {size} 3"]:
    """Take the view that `draw_view` draws."""
    view = draw_view(*video.shape[1:3], rng, min_crop_scale=min_crop_scale, flip=flip)
    out = np.empty((len(video), size, size, 3), np.uint8)
    for frame, own in zip(video, out, strict=True):
        write_view(frame, view, video.shape[1:3], own)
    return out


def draw_view(
    height: int, width: int, rng: np.random.Generator, *, min_crop_scale: float, flip: bool
) -> View:
    """Draw a crop (unless `min_crop_scale` is 1), and a mirror image half of the time.

    The crop covers `min_crop_scale` to 1 of the area at an aspect ratio of 3/4 to 4/3, as
    Szegedy et al. 2015, section 6; one crop and one flip for all frames.
    """
    box = center_box(height, width)
    if min_crop_scale < 1:
        box = random_box(height, width, min_crop_scale, rng)
    return View(box, flip and rng.random() < 0.5)


def write_view(
    frame: Frame, view: View, size: tuple[int, int], out: UInt8[np.ndarray, "s s 3"]
) -> None:
    """Crop, resize and mirror a frame into an array that is there.

    Edges of the crop are rounded to whole pixels. A side that shrinks is a mean of areas, others
    are cubic; against Pillow's bicubic resizing of the same crop, PSNR is above 40 dB.

    Args:
      frame: as decoded, perhaps at a fraction of its size.
      view: of the frame at full size.
      size: that height and width.
      out: gets the view; contiguous.
    """
    left, top, right, bottom = view.box
    rows = _pixels(top / size[0], bottom / size[0], frame.shape[0])
    columns = _pixels(left / size[1], right / size[1], frame.shape[1])
    crop, side = frame[rows, columns], len(out)
    # Sides that shrink first: OpenCV's means of areas are none if the other side grows.
    less = [side if length > _SHRINKS * side else length for length in crop.shape[1::-1]]
    if less != [*crop.shape[1::-1]]:
        crop = cv2.resize(crop, less, interpolation=cv2.INTER_AREA)
    if view.mirrored:
        cv2.flip(cv2.resize(crop, (side, side), interpolation=cv2.INTER_CUBIC), 1, dst=out)
    else:
        cv2.resize(crop, (side, side), dst=out, interpolation=cv2.INTER_CUBIC)


class Jitter(NamedTuple):
    """Changes of color, the same for all frames of a clip; factors of 1 change nothing."""

    factors: Mapping[str, float]  # of "brightness", "contrast" and "saturation", in their order


def draw_jitter(strength: float, rng: np.random.Generator) -> Jitter:
    """Draw factors of 1 - strength to 1 + strength, and the order in which they are applied.

    As torchvision's ColorJitter, without its hue. Of the papers' bases, Singularity changes no
    color, and ALPRO names brightness and contrast among the operations of its RandAugment, one draw
    for all frames; at its level 5 of 10 for videos both have a factor of 1.
    """
    names = rng.permutation(["brightness", "contrast", "saturation"])
    factors = rng.uniform(1 - strength, 1 + strength, len(names))
    return Jitter(dict(zip(names.tolist(), factors.tolist(), strict=True)))


def jitter_frame(frame: Frame, jitter: Jitter) -> None:
    """Change the colors of a frame in place; of each factor as Pillow's `ImageEnhance`.

    Brightness blends with black, contrast with the frame's mean gray, saturation with each pixel's
    gray. Against Pillow, which cuts fractions off where this rounds, a factor differs by one level
    of 255.
    """
    for name, factor in jitter.factors.items():
        if name == "saturation":
            gray = cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            cv2.addWeighted(frame, factor, gray, 1 - factor, 0, dst=frame)
            continue
        mean = 0.0
        if name == "contrast":
            mean = np.rint(cv2.mean(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))[0])
        levels = np.rint(factor * np.arange(256) + (1 - factor) * mean).clip(0, 255)
        cv2.LUT(frame, levels.astype(np.uint8), dst=frame)


def _pixels(start: float, stop: float, count: int) -> slice:
    """Return the whole pixels nearest to a part of a side of `count` pixels: at least one."""
    first = min(round(start * count), count - 1)
    return slice(first, max(first + 1, round(stop * count)))


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
    """Crop and resize every frame bicubically (Pillow) in one step; crop alone if that is all."""
    left, top, right, bottom = map(int, box)
    if box == (left, top, left + size, top + size):
        return np.ascontiguousarray(video[:, top:bottom, left:right])
    resized = np.empty((len(video), size, size, 3), np.uint8)
    for frame, out in zip(video, resized, strict=True):
        image = Image.fromarray(frame)
        out[:] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return resized
