"""Still images as uint8 RGB (Pillow): upright, on white, from the formats that people have."""

import contextlib
import functools
import io
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from data_pipelines.media.errors import DecodeError, as_decode_errors
from data_pipelines.media.jpeg import read_jpeg

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # AVIF since Pillow 11.3
# Their further pictures are previews, depth maps or pages; in all others they are an animation. A
# JPEG with several pictures, as phones write it, is MPO to Pillow.
_FIRST_COUNTS = ("MPO", "TIFF")
_QUARTER_TURNS = (5, 6, 7, 8)  # of EXIF's orientations, those that exchange height and width
_UNREADABLE, _TOO_LARGE = "not a readable image", "an image of too many pixels"


class ImageKind(NamedTuple):
    """Format of an image file, and how many frames its animation has; 1 for a still image."""

    format: str
    num_frames: int


def image_kind(media: bytes) -> ImageKind | None:
    """Read the kind of an image; None for what is no image, or damaged at its beginning.

    Raises:
      DecodeError: it has more pixels than Pillow reads.
    """
    try:
        with as_decode_errors(_UNREADABLE), _open(media) as image:
            return _kind(image)
    except DecodeError as error:
        if error.reason == _TOO_LARGE:
            raise
        return None


def decode_image(media: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a still image to RGB, turned as its EXIF data say, transparency on white (ours).

    Of a file with several pictures (a phone's JPEG, a TIFF with pages) this is the first one. Gray
    of 16 bits becomes gray of 8.

    Raises:
      DecodeError: not a readable image of `IMAGE_FORMATS`, an animation, or an image of more pixels
        than Pillow reads.
    """
    with as_decode_errors(_UNREADABLE), _open(media) as image:
        kind = _kind(image)
        if kind.num_frames > 1:
            raise DecodeError("an animation where an image is expected", f"a {kind.format} file")
        image = _to_8_bits(ImageOps.exif_transpose(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


class Still:
    """A still image whose size is known before it is decoded."""

    def __init__(self, media: bytes):
        """Read the header.

        Raises:
          DecodeError: it is no readable image.
        """
        with as_decode_errors(_UNREADABLE), _open(media) as image:
            turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            self.size = image.size if turn in _QUARTER_TURNS else image.size[::-1]  # height, width
            # Others (turned, CMYK, several pictures) are left to Pillow.
            self._plain = image.format == "JPEG" and image.mode in ("RGB", "L") and turn == 1
        self._media = media

    def decode(self, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Decode as `decode_image`; a JPEG file at a fraction of its size, see `jpeg.read_jpeg`.

        Raises:
          DecodeError: as `decode_image`.
        """
        if self._plain:
            # What is damaged is read as far as Pillow reads it, or refused in its words.
            with contextlib.suppress(ValueError):
                return read_jpeg(self._media, self.size, reduction)
        return decode_image(self._media)


def shrink_image(media: bytes, short_side: int, quality: int) -> bytes:
    """Return the image itself if it is small enough; else a JPEG file if it was one, or PNG.

    Raises:
      DecodeError: as `decode_image`.
    """
    with as_decode_errors(_UNREADABLE), _open(media) as opened:
        jpeg = opened.format in ("JPEG", "MPO")
        if min(opened.size) <= short_side:
            return media
    image = Image.fromarray(decode_image(media))
    scale = short_side / min(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    file = io.BytesIO()
    options = {"quality": quality} if jpeg else {}
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG" if jpeg else "PNG", **options)
    return file.getvalue()


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _open(media: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(media), formats=_known_formats())
    except Image.DecompressionBombError as error:
        raise DecodeError(_TOO_LARGE, str(error)) from error


def _kind(image: Image.Image) -> ImageKind:
    several = image.format not in _FIRST_COUNTS
    return ImageKind(str(image.format), getattr(image, "n_frames", 1) if several else 1)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray of 16 bits, which Pillow would cut off at 255.

    Raises:
      DecodeError: the pixels have 32 bits, of which nobody knows what white is.
    """
    if image.mode in ("I", "F"):
        raise DecodeError("an image of 32 bits a pixel")
    if not image.mode.startswith("I;16"):
        return image
    gray = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((gray + 128) // 257).astype(np.uint8))
