"""Tar files of media with their texts, as img2dataset, video2dataset and webdataset write them.

    00000.tar:  000000012.jpg  000000012.txt  000000012.json  000000013.jpg  ...
    00000.parquet

Members of one sample have one key, the name up to its first dot, and follow each other. The caption
is in `key.txt`, or in `key.json` under a name of `entries.FIELDS` (questions, too), or else in the
Parquet file beside the tar (columns `key` and `caption`). Stills `key_000.jpg`, `key_001.jpg` with
one text `key.txt` are the frames of a clip, which is stored as H.264 at one frame a second: their
times are not known. Tar files are read in their order, each from its beginning to its end.
"""

import io
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data_pipelines.media.endings import IMAGE_ENDINGS, MEDIA_ENDINGS, is_image, type_of
from data_pipelines.media.errors import DecodeError
from data_pipelines.media.images import decode_image
from data_pipelines.media.video_writer import encode_video
from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.records import Example
from data_pipelines.storage.builders import base, readers
from data_pipelines.storage.builders.entries import FIELDS, Fields, Texts, texts_of_entry
from data_pipelines.storage.builders.named import FilesBuilder
from data_pipelines.storage.builders.parquet import read_captions
from data_pipelines.storage.tasks import Skipped, Task

_FRAMES = "frames:"  # before the path of a task that reads several stills
_NUMBER = re.compile(r"_\d+$")

Sample = dict[str, tarfile.TarInfo]  # ending -> member


class WebDataset(FilesBuilder):
    """A data set from tar files, stored under a name of yours."""

    kind = "webdataset"

    def read_file(self, path: Path, fields: Fields) -> Iterator[Task | Skipped]:
        """Yield the tasks of a file."""
        return read_tar(path, fields)

    def load(self, task: Task) -> Example | Skipped:
        """Read the member of a task, or join the stills of one."""
        if not task.path.startswith(_FRAMES):
            return super().load(task)
        try:
            with open(task.path.removeprefix(_FRAMES), "rb") as file:
                file.seek(task.start)
                part = file.read(task.size)
            return base.to_example(task, join_frames(_read_stills(part)))
        except (OSError, DecodeError, tarfile.ReadError) as error:
            return Skipped(task.source, "with unreadable frames", str(error))


def read_tar(path: Path, fields: Fields = FIELDS) -> Iterator[Task | Skipped]:
    """Yield a task for each sample of a tar file; media stay where they are.

    Raises:
      UserError: no tar file, or a compressed one, in which nothing can be found by its place.
    """
    try:
        # Uncompressed only: workers read members by their place.
        tar = tarfile.open(path, "r:")
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file") from error
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}: not an uncompressed tar file ({error})") from error
    with tar:
        try:
            for group in _groups(tar):
                yield from _tasks(tar, path, group, fields)
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            yield Skipped(str(path), "after the end of a tar file that is cut short", str(error))


def _groups(tar: tarfile.TarFile) -> Iterator[dict[str, Sample]]:
    """Yield the samples whose keys are equal but for a number at the end; few at a time."""
    group, common = {}, None
    for member in tar:
        tar.members = []  # tarfile keeps all that it has seen
        path = PurePosixPath(member.name)
        name, _, ending = path.name.partition(".")
        if not member.isfile() or not name:
            continue
        key = str(path.with_name(name))
        # Stills of a clip follow each other, so a group is whole when the next key differs.
        if group and _NUMBER.sub("", key) != common:
            yield group
            group = {}
        common = _NUMBER.sub("", key)
        group.setdefault(key, {})[f".{ending.lower()}"] = member
    if group:
        yield group


def _tasks(
    tar: tarfile.TarFile, path: Path, group: Mapping[str, Sample], fields: Fields
) -> Iterator[Task | Skipped]:
    """Yield the tasks of samples with similar keys: each by itself, or the frames of one clip."""
    texts = {key: _texts(tar, path, key, sample, fields) for key, sample in group.items()}
    for key, sample in group.items():
        media = [ending for ending in MEDIA_ENDINGS if ending in sample]  # clips before thumbnails
        owner = _NUMBER.sub("", key)
        if media and (owner == key or owner not in group or texts[key] is not None):
            member = sample[media[0]]
            place = (str(path), member.size, member.offset_data)
            yield _task(place, type_of(f"media{media[0]}"), path, key, texts[key])
        elif not media and texts[key] is not None:
            lone = all(texts[name] is None for name in group if name != key)
            frames = [
                sample[ending]
                for name, sample in sorted(group.items())
                if name != key and lone
                for ending in IMAGE_ENDINGS
                if ending in sample
            ]
            yield _frames_task(frames, path, key, texts[key])


def _frames_task(
    frames: Sequence[tarfile.TarInfo], path: Path, key: str, texts: Texts | Skipped
) -> Task | Skipped:
    """Return the task of reading the part of a tar file that holds the stills of a clip."""
    if not frames:
        return Skipped(f"{path}:{key}", "without a media member")
    start = min(member.offset for member in frames)
    end = max(member.offset_data + member.size for member in frames)
    # To the end of the block: tarfile reads whole ones.
    end += -end % tarfile.BLOCKSIZE
    if len(frames) == 1:
        place = (str(path), frames[0].size, frames[0].offset_data)
        return _task(place, "image", path, key, texts)
    return _task((f"{_FRAMES}{path}", end - start, start), "video", path, key, texts)


def _task(
    place: tuple[str, int, int],
    media_type: str,
    path: Path,
    key: str,
    texts: Texts | Skipped | None,
) -> Task | Skipped:
    source = f"{path}:{key}"
    if texts is None:
        return Skipped(source, "without a caption")
    if isinstance(texts, Skipped):
        return texts
    file, size, start = place
    captions, questions = texts
    # Keys count anew in each tar file of some makers.
    match_id = f"{path.stem}/{key}"
    return Task(file, size, media_type, captions, match_id, source, questions, (), start)


def _texts(
    tar: tarfile.TarFile, path: Path, key: str, sample: Sample, fields: Fields
) -> Texts | Skipped | None:
    """Return the texts of a sample, None if it has none."""
    try:
        if ".txt" in sample:
            return (_read_text(tar, sample[".txt"]).strip(),), ()
        if ".json" in sample:
            entry = readers.parse_json(_read_text(tar, sample[".json"]), f"{path}:{key}.json")
            return texts_of_entry(entry, f"{path}:{key}.json", fields)
    except (UserError, UnicodeDecodeError) as error:
        return Skipped(f"{path}:{key}", "with unreadable texts", str(error))
    caption = read_captions(path.with_suffix(".parquet")).get(PurePosixPath(key).name)
    return None if caption is None else ((caption,), ())


def _read_text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    tar.fileobj.seek(member.offset_data)
    return tar.fileobj.read(member.size).decode("utf-8-sig")


def _read_stills(part: bytes) -> list[bytes]:
    """Return the images in a part of a tar file, by name."""
    with tarfile.open(fileobj=io.BytesIO(part), mode="r:") as tar:
        members = [member for member in tar if is_image(member.name)]
        # By name: writers put members in any order.
        members.sort(key=lambda member: member.name)
        return [tar.extractfile(member).read() for member in members]


def join_frames(stills: Sequence[bytes]) -> bytes:
    """Encode stills as a clip of one frame a second, all in the size of the first (ours).

    Raises:
      DecodeError: a still cannot be decoded.
    """
    frames = list(map(decode_image, stills))
    height, width = (max(2, side - side % 2) for side in frames[0].shape[:2])  # H.264 needs it even
    resized = [np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames]
    return encode_video(np.stack(resized), fps=1)
