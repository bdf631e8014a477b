"""Endings of the media files that the decoder reads: one list for builders, manifests and search.

Of several files of one stem in a folder, the ending that stands first here counts. A name that ends
in a dot lost its ending, as some of Flickr's did; FFmpeg reads the file all the same.
"""

import os.path
from pathlib import PurePath
from typing import Literal

VIDEO_ENDINGS = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".gif"),
    *(".3g2", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".ts", ".mts", ".m2ts", ".vob", ".mxf"),
    *(".apng", "."),
)
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".jfif", ".mpo", ".tif", ".tiff", ".avif"),
)
MEDIA_ENDINGS = VIDEO_ENDINGS + IMAGE_ENDINGS


def ending(name: str | PurePath) -> str:
    """Return the ending of a file name in lower case, with its dot.

    >>> ending("a/b.0.5.MTS"), ending("a/b."), ending("a.b/c")
    ('.mts', '.', '')
    """
    return os.path.splitext(name)[1].lower()


def is_image(name: str | PurePath) -> bool:
    """Return True for the name of a still image."""
    return ending(name) in IMAGE_ENDINGS


def type_of(name: str | PurePath) -> Literal["video", "image"]:
    """Return the media type of a file by its ending; anything else is taken for a clip."""
    return "image" if is_image(name) else "video"


def is_media(name: str | PurePath) -> bool:
    """Return True for the name of a clip or an image."""
    return ending(name) in MEDIA_ENDINGS


def stem(name: str) -> str:
    """Drop the media endings of a file name, however many; other dots stay.

    >>> stem("a.mov.mp4"), stem("b.0.5.webm"), stem("c.txt")
    ('a', 'b.0.5', 'c.txt')
    """
    head, tail = os.path.splitext(name)
    return stem(head) if head and tail.lower() in MEDIA_ENDINGS else name
