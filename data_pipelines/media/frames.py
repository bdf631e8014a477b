"""Clips as JPEG pictures with their times, of which only those that are shown are read (ours).

    head      magic, where the pictures begin, when the clip ends, height, width, number of
              pictures; then tick, size in bytes and CRC-32 of each picture
    pictures  JPEG files, one after the other

Together they are one media file. Prepared data keep the heads among their records, and the pictures
in a file beside them: then four pictures of a long clip cost four short reads. Times are those of
the H.264 form, in ticks of 1/90,000 s, so that the same random draws show the same frames.
"""

import struct
import zlib
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from data_pipelines.media.errors import DecodeError, as_decode_errors
from data_pipelines.media.jpeg import read_jpeg, write_jpeg
from data_pipelines.media.video_writer import TICK_TOLERANCE, TICKS_PER_SEC, to_ticks

_MAGIC = b"vlmaeJPG"
_HEAD = struct.Struct("<8sQqHHI")
_PICTURE = np.dtype([("tick", "<i8"), ("num_bytes", "<u4"), ("crc", "<u4")])
_UNREADABLE = "not a readable clip of pictures"


def encode_frames(
    frames: Iterable[tuple[float, UInt8[np.ndarray, "h w 3"]]], duration_secs: float, quality: int
) -> bytes:
    """Encode a clip as pictures; equal input gives equal bytes.

    Args:
      frames: (seconds, RGB frame), ascending from 0, as `video_writer.encode_for_sampling` takes
        them: of frames in the same tick only the first is stored.
      duration_secs: how long the clip lasts; the last frame is shown until then.
      quality: of JPEG, 1 to 100.

    Raises:
      ValueError: no frames, or of a size that JPEG does not know.
    """
    ticks, pictures, size = [], [], (0, 0)
    for secs, frame in frames:
        tick = to_ticks(secs)
        if not ticks or tick > ticks[-1]:
            ticks.append(tick)
            pictures.append(write_jpeg(frame, quality))
            size = frame.shape[:2]
    if not pictures:
        raise ValueError("a clip needs at least one frame")
    table = np.empty(len(pictures), _PICTURE)
    table["tick"] = ticks
    table["num_bytes"] = list(map(len, pictures))
    table["crc"] = list(map(zlib.crc32, pictures))
    end = max(to_ticks(duration_secs), ticks[-1] + 1)
    head_size = _HEAD.size + table.nbytes
    head = _HEAD.pack(_MAGIC, head_size, end, *size, len(pictures)) + table.tobytes()
    return b"".join([head, *pictures])


def split(media: bytes, start: int) -> tuple[bytes, bytes]:
    """Split a clip into head and pictures; the head says that these begin at `start` of a file."""
    magic, head_size, *rest = _HEAD.unpack_from(media)
    head = _HEAD.pack(magic, start, *rest) + media[_HEAD.size : head_size]
    return head, media[head_size:]


class FrameClip:
    """A clip whose pictures are read one by one."""

    def __init__(self, head: bytes, read: Callable[[int, int], bytes]):
        """Read the head.

        Args:
          head: its bytes; more may follow.
          read: returns a number of bytes from a place of the file with the pictures.

        Raises:
          DecodeError: it is no head.
        """
        with as_decode_errors(_UNREADABLE):
            magic, start, self._end, height, width, count = _HEAD.unpack_from(head)
            if magic != _MAGIC:
                raise DecodeError(_UNREADABLE)
            self._pictures = np.frombuffer(head, _PICTURE, count, _HEAD.size)
        self._ends = start + np.cumsum(self._pictures["num_bytes"], dtype=np.int64)
        self._read = read
        self.size = height, width

    @property
    def duration_secs(self) -> float:
        """Seconds from the first picture to the end of the last."""
        return self._end / TICKS_PER_SEC

    def frames(
        self, times_secs: npt.ArrayLike, reduction: int = 1
    ) -> list[UInt8[np.ndarray, "h w 3"]]:
        """Decode the frames shown at some times, clamped into the clip; perhaps at less size.

        Raises:
          DecodeError: a picture is damaged.
        """
        times = np.clip(np.asarray(times_secs, np.float64), 0, self.duration_secs)
        ticks = np.floor(times * TICKS_PER_SEC + TICK_TOLERANCE)
        places = np.searchsorted(self._pictures["tick"], ticks, side="right") - 1
        with as_decode_errors(_UNREADABLE):
            pictures = [self.picture(place) for place in np.maximum(places, 0)]
            return [read_jpeg(picture, self.size, reduction) for picture in pictures]

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self._pictures)

    def picture(self, place: int) -> bytes:
        """Read a JPEG file.

        Raises:
          DecodeError: it is damaged, or cannot be read.
        """
        _, num_bytes, crc = self._pictures[place].item()
        with as_decode_errors("not a readable media file"):
            picture = self._read(int(self._ends[place]) - num_bytes, num_bytes)
        if zlib.crc32(picture) != crc:
            raise DecodeError("damaged record", f"picture {place} has another checksum")
        return picture


def whole_clip(media: bytes) -> FrameClip:
    """Open a clip that is in memory with its pictures.

    Raises:
      DecodeError: it is none.
    """
    return FrameClip(media, lambda start, count: media[start : start + count])
