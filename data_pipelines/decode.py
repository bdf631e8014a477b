"""Frames of a clip at given times (PyAV) and still images (Pillow), as uint8 RGB.

The one rule for time: the frame *shown* at time t is the last one whose presentation time is at
most t. Times count in seconds from the clip's own start, whatever its time stamps begin with.
"""

import bisect
import contextlib
import io
import itertools
import math
import pathlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image, ImageOps

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# An H.264 frame is shown at most 16 frames later than it is decoded.
_MAX_REORDERED_FRAMES = 16
# Whose packets say whether other frames need them; half of the frames of web video nobody needs.
_MAY_SKIP = ("h264",)
_PTS_TOLERANCE = 1e-3  # of one tick: float rounding of times must not lose a frame
_COUNT_TOLERANCE = 1e-3  # of one frame: float rounding of a duration must not add a frame
# Titles that are not UTF-8 must not make a clip unreadable; PyAV 19 and later need no telling.
_READ_ANY_METADATA = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)

Media = bytes | str | pathlib.Path


class DecodeError(ValueError):
    """Media that cannot be used; `reason` is a short phrase to count by, `detail` is free text."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class ClipInfo(NamedTuple):
    """What a container says about its first video stream."""

    duration_secs: float
    fps: float  # the average; frames need not be evenly spaced
    num_frames: int | None  # None where the container does not say


def probe(media: Media) -> ClipInfo:
    """Duration, frame rate and frame count of a clip, without decoding it (ours).

    Raises:
      DecodeError: not a readable video, or one without a duration.
    """
    with open_clip(media) as clip:
        return clip.info


def decode_frames(media: Media, times_secs: npt.ArrayLike) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames shown at `times_secs` (any order), which are clamped into the clip (ours).

    Raises:
      DecodeError: not a readable video, or one that ends before a wanted time (truncated).
    """
    with open_clip(media) as clip:
        return clip.frames(times_secs)


def decode_image(media: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """A still image as RGB, turned as its EXIF data say, transparency on white (ours).

    Raises:
      DecodeError: not a readable PNG, JPEG, WebP, GIF or BMP, or an animation.
    """
    try:
        with Image.open(io.BytesIO(media), formats=IMAGE_FORMATS) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise DecodeError("an animation where an image is expected")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError("not a readable image", str(error)) from error


def check_media(media: bytes, media_type: Literal["video", "image"]) -> None:
    """Decodes enough to know that media are whole and of the type they are said to be (ours).

    Of a video the first and the last frame are decoded, so that a truncated file shows.

    Raises:
      DecodeError: says what is wrong.
    """
    if media_type == "image":
        if _is_video(media):
            raise DecodeError("a video where an image is expected")
        decode_image(media)
        return
    if _is_still_image(media):
        raise DecodeError("an image where a video is expected")
    with open_clip(media) as clip:
        clip.frames([0.0])
        if clip.at_last_frame:
            raise DecodeError("a single frame where a video is expected")
        clip.frames([clip.info.duration_secs])


@contextlib.contextmanager
def open_clip(media: Media) -> Iterator["Clip"]:
    """Opens a clip for several reads; the container is closed at the end.

    Raises:
      DecodeError: also for what FFmpeg raises inside the `with` block.
    """
    file = io.BytesIO(media) if isinstance(media, bytes) else str(media)
    try:
        with av.open(file, **_READ_ANY_METADATA) as container:
            yield Clip(container)
    except av.error.FFmpegError as error:
        raise DecodeError("not a readable video", error.strerror) from error


class Clip:
    """The first video stream of an open container; made by `open_clip`."""

    def __init__(self, container: av.container.InputContainer):
        if not container.streams.video:
            raise DecodeError("without a video stream")
        self._container = container
        self._stream = container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # the pipeline's workers are the parallelism
        self._reformatter = VideoReformatter()
        self._wanted: Sequence[int] = ()  # ascending ticks, for which alone frames must be there
        self.info = self._read_info()
        self._restart()
        if self._current is None:
            raise DecodeError("without a decodable frame")

    @property
    def at_last_frame(self) -> bool:
        """Whether the last frame read is the clip's last one."""
        return self._next is None

    def frames(self, times_secs: npt.ArrayLike) -> UInt8[np.ndarray, "t h w 3"]:
        """The frames shown at the given times, as `decode_frames`."""
        times = np.clip(np.asarray(times_secs, np.float64), 0, self.info.duration_secs)
        self._want([self._pts_at(time) for time in times])
        frames = None
        for place in np.argsort(times, kind="stable"):
            frame = self._frame_at(times[place])
            if frames is None:
                width, height = frame.width, frame.height
                frames = np.empty((len(times), height, width, 3), np.uint8)
            # A stream may change its frame size; the first size holds for the clip. More than
            # one thread makes the conversion of small frames many times slower.
            frame = self._reformatter.reformat(frame, width, height, "rgb24", threads=1)
            frames[place] = frame.to_ndarray()
        return frames

    def _want(self, pts: list[int]) -> None:
        """From now on, frames that no other frame needs are decoded for these ticks alone."""
        if self._wanted:  # frames that were left out may be looked for now
            self._wanted = sorted(pts)
            self._rewind()
        elif self._stream.codec_context.name in _MAY_SKIP:
            self._wanted = sorted(pts)

    def walk(self, fps: float | None = None) -> Iterator[tuple[float, av.VideoFrame]]:
        """(seconds, frame) of a whole clip in order, for an open clip that nothing else reads.

        Without `fps` every frame with the time at which it is first shown; else the frames that are
        shown at 0, 1 / fps, 2 / fps and so on.

        Raises:
          DecodeError: as `decode_frames`.
        """
        if fps is None:
            yield from self._every_frame()
            return
        num_frames = max(1, math.ceil(self.info.duration_secs * fps - _COUNT_TOLERANCE))
        for secs in (place / fps for place in range(num_frames)):
            yield secs, self._frame_at(secs)

    def _every_frame(self) -> Iterator[tuple[float, av.VideoFrame]]:
        yield 0.0, self._current
        while self._next is not None:
            self._current, self._next = self._next, self._read()
            ticks = self._current.pts - self._start_pts
            yield float(ticks * self._stream.time_base), self._current
        self._check_reaches(self.info.duration_secs)

    def _read_info(self) -> ClipInfo:
        stream = self._stream
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        if stream.duration:
            duration = float(stream.duration * stream.time_base)
        elif self._container.duration:
            duration = self._container.duration / av.time_base
        else:
            raise DecodeError("without a duration")
        return ClipInfo(duration, fps, stream.frames or None)

    def _restart(self) -> None:
        """Reads the first two frames from where the container stands, if there are any."""
        self._decoded = self._decode()
        self._current = self._read()
        self._next = self._read()
        if self._current is None:
            return
        if self._stream.start_time is None:
            self._start_pts = self._current.pts
        else:
            self._start_pts = self._stream.start_time

    def _decode(self) -> Iterator[av.VideoFrame]:
        """The frames from where the container stands, but for those that may be missing."""
        packets = self._container.demux(self._stream)
        passed: deque[int | None] = deque(maxlen=_MAX_REORDERED_FRAMES)
        ahead: deque[av.Packet] = deque()
        while True:
            ahead.extend(itertools.islice(packets, _MAX_REORDERED_FRAMES + 1 - len(ahead)))
            if not ahead:
                return
            packet = ahead.popleft()
            near = [*passed, *(other.pts for other in ahead if other.size)]
            needed = self._is_wanted(packet.pts, near)
            self._stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            yield from packet.decode()
            passed.append(packet.pts)

    def _is_wanted(self, pts: int | None, near: Sequence[int | None]) -> bool:
        """Whether something may be wanted of what is shown from `pts` on.

        That is, until the next frame; where that one is not among those `near`, a later one only
        makes more frames wanted than are.
        """
        if not self._wanted or pts is None or None in near:
            return True
        following = min((other for other in near if other > pts), default=math.inf)
        place = bisect.bisect_left(self._wanted, pts)
        return place < len(self._wanted) and self._wanted[place] < following

    def _read(self) -> av.VideoFrame | None:
        frame = next(self._decoded, None)
        if frame is not None and frame.pts is None:
            raise DecodeError("without time stamps")
        return frame

    def _frame_at(self, time_secs: float) -> av.VideoFrame:
        pts = self._pts_at(time_secs)
        if pts < self._current.pts or self._key_frame_between(pts):
            self._seek(pts)
        while self._next is not None and self._next.pts <= pts:
            self._current, self._next = self._next, self._read()
        if self._next is None:
            self._check_reaches(time_secs)
        return self._current

    def _pts_at(self, time_secs: float) -> int:
        ticks = time_secs / float(self._stream.time_base) + _PTS_TOLERANCE
        return self._start_pts + math.floor(ticks)

    @property
    def _reorder_ticks(self) -> int:
        """How much later than it is decoded a frame may be shown.

        A stream need not say that it reorders frames, so this may be too little: `_seek` sees that.
        """
        return self._most_reorder_ticks if self._stream.codec_context.has_b_frames else 0

    @property
    def _most_reorder_ticks(self) -> int:
        return math.ceil(_MAX_REORDERED_FRAMES / self.info.fps / float(self._stream.time_base))

    def _key_frame_between(self, pts: int) -> bool:
        """Whether a key frame lies after the frames read so far and safely before `pts`.

        The container's index holds decoding times, hence the margin. Without an index (MPEG
        program streams, where seeking is not exact either) the answer is no.
        """
        entries = self._stream.index_entries
        place = entries.search_timestamp(pts - self._reorder_ticks, backward=True)
        return place >= 0 and self._next is not None and entries[place].timestamp > self._next.pts

    def _seek(self, pts: int) -> None:
        """Moves to a key frame at or before `pts`; further back if seeking went past it."""
        margins = (self._reorder_ticks, self._most_reorder_ticks)
        for margin in dict.fromkeys(margins):
            if self._restart_at(pts - margin) and self._current.pts <= pts:
                return
        if self._current is None:  # the index names key frames that are not in the file
            raise DecodeError("truncated")
        self._rewind()

    def _rewind(self) -> None:
        if not self._restart_at(self._start_pts - self._most_reorder_ticks):
            raise DecodeError("truncated")

    def _restart_at(self, pts: int) -> bool:
        """Moves to a key frame, and says whether there is a frame."""
        pts = max(int(pts), min(0, self._start_pts))  # FLV knows no times below zero
        self._container.seek(pts, stream=self._stream, backward=True)
        self._restart()
        return self._current is not None

    def _check_reaches(self, time_secs: float) -> None:
        """Raises DecodeError if the stream ended well before `time_secs`."""
        frame_secs = 1 / self.info.fps
        shown_ticks = self._current.pts - self._start_pts + (self._current.duration or 0)
        end_secs = max(frame_secs, float(shown_ticks * self._stream.time_base))
        # Only the container's duration is known for some formats, and sound may be longer.
        exact = self._stream.duration or len(self._container.streams) == 1
        slack = max(2 * frame_secs, (0.05 if exact else 0.5) * self.info.duration_secs)
        if time_secs > end_secs + slack:
            detail = f"frames end at {end_secs:.2f} s of {self.info.duration_secs:.2f} s"
            raise DecodeError("truncated", detail)


def _is_still_image(media: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(media), formats=IMAGE_FORMATS) as image:
            return getattr(image, "n_frames", 1) == 1
    except (OSError, SyntaxError, ValueError):
        return False


def _is_video(media: bytes) -> bool:
    """Whether media are no image at all but have a video stream."""
    try:
        with Image.open(io.BytesIO(media), formats=IMAGE_FORMATS):
            return False
    except (OSError, SyntaxError, ValueError):
        pass
    try:
        with open_clip(media):
            return True
    except DecodeError:
        return False
