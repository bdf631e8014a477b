"""Every listed ending is one that the decoder reads."""

import io

import pytest
from PIL import Image

from data_pipelines.media import decode
from data_pipelines.media.endings import IMAGE_ENDINGS, MEDIA_ENDINGS, VIDEO_ENDINGS, is_image

WRITTEN_AS = {  # ending -> container and codec by which FFmpeg makes such a file
    ".mp4": ("mp4", "libx264"),
    ".m4v": ("mp4", "mpeg4"),
    ".mov": ("mov", "libx264"),
    ".f4v": ("f4v", "libx264"),
    ".3gp": ("3gp", "mpeg4"),
    ".3g2": ("3g2", "mpeg4"),
    ".mkv": ("matroska", "libx264"),
    ".webm": ("webm", "libvpx"),
    ".avi": ("avi", "mpeg4"),
    ".mpg": ("mpeg", "mpeg2video"),
    ".mpeg": ("mpeg", "mpeg1video"),
    ".vob": ("vob", "mpeg2video"),
    ".ts": ("mpegts", "libx264"),
    ".mts": ("mpegts", "libx264"),
    ".m2ts": ("mpegts", "mpeg2video"),
    ".wmv": ("asf", "wmv2"),
    ".asf": ("asf", "wmv2"),
    ".flv": ("flv", "flv"),
    ".ogv": ("ogg", "libvpx"),
    ".mxf": ("mxf", "mpeg2video"),
    ".apng": ("apng", "apng"),
    ".gif": None,  # by Pillow, below
    ".": ("mp4", "libx264"),  # its ending was lost
}
STILL_FORMATS = {".jfif": "JPEG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}


@pytest.mark.parametrize("ending", VIDEO_ENDINGS)
def test_clips_of_every_ending_are_decoded(write_clip, small_media, ending):
    written_as = WRITTEN_AS[ending]
    times_ms = range(0, 480, 40)
    clip = write_clip(times_ms, *written_as) if written_as else small_media[ending]
    decode.check_media(clip, "video")
    assert decode.probe(clip).duration_secs > 0 and not is_image(f"a{ending}")


@pytest.mark.parametrize("ending", IMAGE_ENDINGS)
def test_images_of_every_ending_are_decoded(ending):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, STILL_FORMATS.get(ending, ending[1:].upper()))
    decode.check_media(file.getvalue(), "image")
    assert is_image(f"a{ending.upper()}")


def test_endings_are_listed_once():
    assert len(set(MEDIA_ENDINGS)) == len(MEDIA_ENDINGS)
