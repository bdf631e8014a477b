"""Members of the emoji archives, and their pictures: animated WebP to H.264, PNG onto white."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.media.video_writer import encode_video
from data_pipelines.schema.checks import UserError

CLIP_SIZE = 128  # pixels
CLIP_FPS = 12


def read_members(archive: Path, folder: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yield (file name without suffix, content) of the files right in `folder` of a .tgz.

    Raises:
        UserError: the archive holds no such file.
    """
    found = False
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and path.suffix == suffix and str(path.parent) == folder:
                found = True
                yield path.stem, tar.extractfile(member).read()
    if not found:
        raise UserError(f"{archive} holds no {folder}/*{suffix}")


def on_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB, its transparent parts white."""
    rgba = image.convert("RGBA")
    # On white: H.264 has no transparency, and black would swallow dark outlines.
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def png_on_white(data: bytes) -> bytes:
    """Return a PNG with transparency as a PNG without, at its own size."""
    output = io.BytesIO()
    on_white(Image.open(io.BytesIO(data))).save(output, "PNG")
    return output.getvalue()


def resample_frames(image: Image.Image, size: int, fps: int) -> UInt8[np.ndarray, "t h w 3"]:
    """Resample an animation on white, `size` pixels square, at a constant `fps` (ours).

    Frame k is the one shown at k / fps by the animation's own durations; none is repeated beyond
    its end. The frames are stepped in order, since each may build on the one before.

    Raises:
        UserError: all durations are zero.
    """
    frames, end_ms = [], 0
    for index in range(image.n_frames):
        image.seek(index)
        image.load()  # only now Pillow knows the duration
        end_ms += image.info["duration"]
        if len(frames) * 1000 < end_ms * fps:
            frame = np.asarray(on_white(image).resize((size, size), Image.Resampling.BOX))
        while len(frames) * 1000 < end_ms * fps:
            frames.append(frame)
    if not frames:
        raise UserError("every frame has a duration of zero")
    return np.stack(frames[: max(1, end_ms * fps // 1000)])


def clip_from_webp(data: bytes) -> bytes | None:
    """Return an animated WebP as H.264 in MP4, without sound; None if it holds a single picture."""
    image = Image.open(io.BytesIO(data))
    if image.n_frames == 1:
        return None
    return encode_video(resample_frames(image, CLIP_SIZE, CLIP_FPS), CLIP_FPS)


def convert_archive(archive: Path, folder: str = "package/assets") -> dict[str, bytes | None]:
    """Convert every .webp of an archive by `clip_from_webp`; keys are names without suffix.

    Raises:
        UserError: a file cannot be read; the message names the archive and the file.
    """
    clips = {}
    for name, data in read_members(archive, folder, ".webp"):
        try:
            clips[name] = clip_from_webp(data)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{archive}, {folder}/{name}.webp: {error}") from error
    return clips
