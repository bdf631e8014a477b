"""Frames of a clip at given times (PyAV), as uint8 RGB, turned and sized as they are shown.

The one rule for time: the frame *shown* at time t is the last one whose presentation time is at
most t. Times count in seconds from the video's own start, whatever its time stamps begin with, and
whether or not sound begins before it.
"""

import bisect
import contextlib
import functools
import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.media.display import display_of, to_rgb
from data_pipelines.media.errors import OURS, DecodeError, as_decode_errors
from data_pipelines.media.images import decode_image, image_kind
from data_pipelines.media.source import SLACK, ClipInfo, Media, Source

# An H.264 frame is shown at most 16 frames later than it is decoded.
_MAX_REORDERED_FRAMES = 16
# Codecs that mark frames to which no other frame refers: half of the frames of web video.
_MAY_SKIP = ("h264",)
_PTS_TOLERANCE = 1e-3  # of one tick: float rounding of times must not lose a frame
_COUNT_TOLERANCE = 1e-3  # of one frame: float rounding of a duration must not add a frame
_MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # of a frame: twice those of 8K video; headers may be damaged
_decoding = functools.partial(as_decode_errors, "not a readable video", OURS)


def probe(media: Media) -> ClipInfo:
    """Read duration, frame rate and frame count of a clip, without decoding it (ours).

    Raises:
      DecodeError: not a readable video, or one without a duration.
    """
    with open_clip(media) as clip:
        return clip.info


def decode_frames(media: Media, times_secs: npt.ArrayLike) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode the frames shown at `times_secs` (any order), clamped into the clip (ours).

    Raises:
      DecodeError: not a readable video, or one that ends before a wanted time (truncated).
    """
    with open_clip(media) as clip:
        return clip.frames(times_secs)


def check_media(media: bytes, media_type: Literal["video", "image"]) -> None:
    """Decode enough to know that media are whole and of the type they are said to be (ours).

    Of a video the first and the last frame are decoded, so that a truncated file shows.

    Raises:
      DecodeError: says what is wrong.
    """
    kind = image_kind(media)
    if media_type == "image":
        if kind is None and _is_video(media):
            raise DecodeError("a video where an image is expected")
        decode_image(media)
        return
    if kind and kind.num_frames == 1:
        raise DecodeError("an image where a video is expected")
    if kind and kind.format == "WEBP":
        raise DecodeError("an animated WebP file", "convert it, say to GIF or MP4")
    with open_clip(media) as clip:
        clip.frames([0.0])
        if clip.at_last_frame:
            raise DecodeError("a single frame where a video is expected")
        clip.frames([clip.info.duration_secs])


@contextlib.contextmanager
def open_clip(media: Media) -> Iterator["Clip"]:
    """Open a clip for several reads; the file is closed at the end.

    Raises:
      DecodeError: it is not a readable video.
    """
    with contextlib.ExitStack() as stack:
        with _decoding():
            source = stack.enter_context(contextlib.closing(Source(media)))
            clip = Clip(source)
        yield clip


class Clip:
    """The video of an open file; made by `open_clip`."""

    def __init__(self, source: Source):
        """Read the first frames.

        Raises:
          DecodeError: there is no frame that can be decoded.
        """
        self.info = source.info
        self._source = source
        self._reformatter = VideoReformatter()
        self._wanted: Sequence[int] = ()  # ascending ticks, for which alone frames must be there
        self._restart()
        if self._current is None:
            raise DecodeError("without a decodable frame")
        self._start_pts = source.stream.start_time
        if self._start_pts is None:
            self._start_pts = self._current.pts
        elif source.counts_frames and self._current.pts > self._start_pts:  # begins after the sound
            late_secs = float((self._current.pts - self._start_pts) * source.stream.time_base)
            self.info = self.info._replace(duration_secs=self.info.duration_secs - late_secs)
            self._start_pts = self._current.pts
        self._display = display_of(self._current, source.stream.sample_aspect_ratio)
        if self._display.height * self._display.width > _MAX_PIXELS:
            raise DecodeError("a video of too many pixels")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames as they are shown."""
        return self._display.height, self._display.width

    @property
    def at_last_frame(self) -> bool:
        """True if the last frame read is the clip's last one."""
        return self._next is None

    def frames(self, times_secs: npt.ArrayLike) -> UInt8[np.ndarray, "t h w 3"]:
        """Decode the frames shown at the given times, as `decode_frames`."""
        times = np.clip(np.asarray(times_secs, np.float64), 0, self.info.duration_secs)
        with _decoding():
            frames = np.empty((len(times), *self.size, 3), np.uint8)
            self._want([self._pts_at(time) for time in times])
            for place in np.argsort(times, kind="stable"):
                # A stream may change its frame size; the first size holds for the clip.
                frame = self._frame_at(times[place])
                frames[place] = to_rgb(frame, self._display, self._reformatter)
        return frames

    def _want(self, pts: list[int]) -> None:
        """Skip, from now on, frames that neither these ticks nor other frames need."""
        if self._wanted:  # frames that were left out may be looked for now
            self._wanted = sorted(pts)
            self._rewind()
        elif self._source.stream.codec_context.name in _MAY_SKIP:
            self._wanted = sorted(pts)

    def walk(
        self, fps: float | None = None, size: tuple[int, int] | None = None
    ) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
        """Yield (seconds, frame) of a whole clip in order; nothing else may read it meanwhile.

        Args:
          fps: the frames shown at 0, 1 / fps, 2 / fps and so on, each once. Without it, all
            frames, each with the time at which it is first shown.
          size: height and width of the frames, which are resized bicubically.

        Raises:
          DecodeError: as `decode_frames`.
        """
        frames = self._every_frame() if fps is None else self._frames_at_rate(fps)
        while True:
            with _decoding():
                secs, frame = next(frames, (0.0, None))
                if frame is None:
                    return
                rgb = to_rgb(frame, self._display, self._reformatter, size, "BICUBIC")
            yield secs, rgb

    def _frames_at_rate(self, fps: float) -> Iterator[tuple[float, av.VideoFrame]]:
        num_frames = max(1, math.ceil(self.info.duration_secs * fps - _COUNT_TOLERANCE))
        before = None
        for secs in (place / fps for place in range(num_frames)):
            frame = self._frame_at(secs)
            if frame is not before:  # a still of hours, or a damaged time, is one frame
                yield secs, frame
            before = frame

    def _every_frame(self) -> Iterator[tuple[float, av.VideoFrame]]:
        yield 0.0, self._current
        while self._next is not None:
            self._current, self._next = self._next, self._read()
            ticks = self._current.pts - self._start_pts
            yield float(ticks * self._source.stream.time_base), self._current
        self._check_reaches(self.info.duration_secs)

    def _restart(self) -> None:
        """Read the first two frames from where the file stands, if there are any."""
        self._decoded = self._decode_counted() if self._source.counts_frames else self._decode()
        self._current = self._read()
        self._next = self._read() if self._current else None

    def _decode(self) -> Iterator[av.VideoFrame]:
        """Yield the frames from where the file stands, except those that may be skipped."""
        packets, context = self._source.packets(), self._source.stream.codec_context
        passed: deque[int | None] = deque(maxlen=_MAX_REORDERED_FRAMES)
        ahead: deque[av.Packet] = deque()
        while True:
            ahead.extend(itertools.islice(packets, _MAX_REORDERED_FRAMES + 1 - len(ahead)))
            if not ahead:
                return
            packet = ahead.popleft()
            near = [*passed, *(other.pts for other in ahead if other.size)]
            context.skip_frame = "DEFAULT" if self._is_wanted(packet.pts, near) else "NONREF"
            yield from packet.decode()
            passed.append(packet.pts)

    def _decode_counted(self) -> Iterator[av.VideoFrame]:
        """Yield all frames, the i-th one with the i-th of the packets' times."""
        times: list[int] = []
        for packet in self._source.packets():
            if packet.size and packet.dts is not None:
                heapq.heappush(times, packet.dts)
            for frame in packet.decode():
                if times:  # a packet may hold two frames
                    frame.pts = heapq.heappop(times)
                yield frame

    def _is_wanted(self, pts: int | None, near: Sequence[int | None]) -> bool:
        """Return True if a wanted tick may lie between `pts` and the next frame.

        The next frame is looked for among those `near`. If it is not among them, a later one is
        taken, and a frame too many may be decoded, never one too few.
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
        ticks = time_secs / float(self._source.stream.time_base) + _PTS_TOLERANCE
        return self._start_pts + math.floor(ticks)

    @property
    def _reorder_ticks(self) -> int:
        """Ticks from the decoding of a frame until it is shown, at most.

        A stream need not say that it reorders frames, so this may be too little: `_seek` sees that.
        """
        return self._most_reorder_ticks if self._source.stream.codec_context.has_b_frames else 0

    @property
    def _most_reorder_ticks(self) -> int:
        secs_per_tick = float(self._source.stream.time_base)
        return math.ceil(_MAX_REORDERED_FRAMES / self.info.fps / secs_per_tick)

    def _key_frame_between(self, pts: int) -> bool:
        """Return True if a key frame lies after the frames read so far and safely before `pts`.

        The container's index holds decoding times, hence the margin.
        """
        if self._next is None or not self._source.seeks:
            return False
        entries = self._source.stream.index_entries
        place = entries.search_timestamp(pts - self._reorder_ticks, backward=True)
        return place >= 0 and entries[place].timestamp > self._next.pts

    def _seek(self, pts: int) -> None:
        """Move to a key frame at or before `pts`; further back if seeking went past it."""
        margins = (self._reorder_ticks, self._most_reorder_ticks) if self._source.seeks else ()
        for margin in dict.fromkeys(margins):
            self._source.seek(pts - margin)
            self._restart()
            if self._current is not None and self._current.pts <= pts:
                return
        if margins and self._current is None:  # the index names key frames that are not there
            raise DecodeError("truncated")
        self._rewind()

    def _rewind(self) -> None:
        self._source.rewind()
        self._restart()
        if self._current is None:
            raise DecodeError("truncated")

    def _check_reaches(self, time_secs: float) -> None:
        """Raise DecodeError if the stream ended well before `time_secs`."""
        frame_secs = 1 / self.info.fps
        shown_ticks = self._current.pts - self._start_pts + (self._current.duration or 0)
        end_secs = max(frame_secs, float(shown_ticks * self._source.stream.time_base))
        if time_secs > end_secs + max(2 * frame_secs, SLACK * self.info.duration_secs):
            detail = f"frames end at {end_secs:.2f} s of {self.info.duration_secs:.2f} s"
            raise DecodeError("truncated", detail)


def _is_video(media: bytes) -> bool:
    """Return True if media have a video stream."""
    try:
        with open_clip(media):
            return True
    except DecodeError:
        return False
