"""Still images of phones, scanners and microscopes; animations are refused by name."""

import io

import numpy as np
import pytest
from PIL import Image, features

from data_pipelines.media import decode, images
from data_pipelines.media.errors import DecodeError
from data_pipelines.media.reencode import Reencode, reencode


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_of_16_bits_keeps_its_shades(kind):
    gray = np.array([[0, 0x2000, 0x8000, 0xFFFF]], np.uint16).repeat(2, axis=0)
    decoded = images.decode_image(encode(Image.fromarray(gray), kind))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 32, 128, 255])
    assert (decoded == decoded[..., :1]).all()


def test_a_phones_jpeg_with_a_second_picture_is_its_first():
    photo = Image.new("RGB", (64, 48), (200, 100, 50))
    gain_map = Image.new("RGB", (32, 24))
    media = encode(photo, "MPO", save_all=True, append_images=[gain_map])
    with Image.open(io.BytesIO(media)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2), "not what is tested"
    decode.check_media(media, "image")
    decoded = images.decode_image(media)
    assert decoded.shape == (48, 64, 3) and abs(decoded.astype(int) - (200, 100, 50)).max() < 4
    with Image.open(io.BytesIO(reencode(media, "image", Reencode(short_side=24)))) as image:
        assert (image.format, image.size) == ("JPEG", (32, 24))


@pytest.mark.parametrize("kind", ["TIFF", "AVIF"])
def test_formats_that_pillow_reads(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    decoded = images.decode_image(encode(Image.new("RGB", (32, 16), (250, 10, 10)), kind))
    assert decoded.shape == (16, 32, 3) and decoded[8, 8, 0] > 240


def test_the_first_page_of_a_tiff_counts():
    pages = [Image.new("L", (8, 8), value) for value in (10, 20)]
    media = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert images.decode_image(media)[0, 0, 0] == 10


@pytest.mark.parametrize(("kind", "name"), [("GIF", "GIF"), ("PNG", "PNG"), ("WEBP", "WEBP")])
def test_animations_are_refused_by_name_as_images(numbered_frames, kind, name):
    first, *rest = (Image.fromarray(frame) for frame in numbered_frames(3))
    media = encode(first, kind, save_all=True, append_images=rest, duration=100)
    with pytest.raises(decode.DecodeError, match=f"an animation where an image.*a {name} file"):
        decode.check_media(media, "image")


def test_animated_png_is_a_clip_and_animated_webp_is_none(numbered_frames, read_numbers):
    first, *rest = (Image.fromarray(frame) for frame in numbered_frames(5))
    options = {"save_all": True, "append_images": rest, "duration": 100, "lossless": True}
    clip = encode(first, "PNG", **options)
    decode.check_media(clip, "video")
    assert read_numbers(decode.decode_frames(clip, [0.05, 0.25, 0.45])) == [0, 2, 4]
    with pytest.raises(decode.DecodeError, match="an animated WebP file: convert it"):
        decode.check_media(encode(first, "WEBP", **options), "video")


def test_images_of_too_many_pixels_are_refused_by_name(monkeypatch):
    media = encode(Image.new("L", (200, 200)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for media_type in ("image", "video"):
        with pytest.raises(decode.DecodeError, match="an image of too many pixels"):
            decode.check_media(media, media_type)


def test_images_of_32_bits_are_refused():
    media = encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(decode.DecodeError, match="32 bits"):
        images.decode_image(media)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_images_stand_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.array([[0, 90], [180, 250]], np.uint8).repeat(16, 0).repeat(8, 1))
    media = encode(image, kind, exif=exif)
    decoded = images.decode_image(media)[..., 0].astype(int)
    height, width = decoded.shape
    seen = decoded[[[2], [height - 3]], [2, width - 3]]
    # EXIF 2.32, table of Orientation: where the stored row 0 and column 0 are shown.
    shown = np.array([[0, 90], [180, 250]])
    shown = shown.T if orientation > 4 else shown
    shown = shown[::-1] if orientation in (3, 4, 7, 8) else shown
    shown = shown[:, ::-1] if orientation in (2, 3, 6, 7) else shown
    np.testing.assert_allclose(seen, shown, atol=12)


def photo(size=(90, 61), **options) -> bytes:
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    file = io.BytesIO()
    image = coarse.resize(size, Image.Resampling.BICUBIC).convert(options.pop("mode", "RGB"))
    image.save(file, options.pop("kind", "JPEG"), **options)
    return file.getvalue()


def turned(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize(
    "media",
    [
        photo(),
        photo(mode="L"),
        photo(mode="CMYK"),
        photo(progressive=True),
        photo(exif=turned(1)),
        photo(exif=turned(3)),
        photo(exif=turned(6)),
        photo(kind="PNG"),
        photo() + b"left over",
    ],
)
def test_a_still_is_what_pillow_decodes(media):
    still, expected = images.Still(media), images.decode_image(media)
    assert still.size == expected.shape[:2]
    np.testing.assert_allclose(still.decode().astype(int), expected, atol=2)
    reduced = still.decode(2)
    assert reduced.shape in (
        expected.shape,
        ((still.size[0] + 1) // 2, (still.size[1] + 1) // 2, 3),
    )
    np.testing.assert_allclose(reduced.mean(axis=(0, 1)), expected.mean(axis=(0, 1)), atol=3)


def test_plain_jpeg_files_are_reduced_while_decoding(monkeypatch):
    monkeypatch.setattr(images, "decode_image", None)
    assert images.Still(photo()).decode(2).shape == (31, 45, 3)


def test_a_damaged_still_is_refused_as_pillow_refuses_it():
    with pytest.raises(DecodeError, match="not a readable image"):
        images.Still(photo()[:-200]).decode()
    with pytest.raises(DecodeError, match="not a readable image"):
        images.Still(b"no image")
