"""An open media file: its video stream, when that begins and ends, packets in order, seeking."""

import io
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import av

from data_pipelines.media.errors import DecodeError

Media = bytes | str | pathlib.Path

# Titles that are not UTF-8 must not make a clip unreadable; PyAV 19 and later need no telling.
_READ_ANY_METADATA = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)
# Containers that lead to a key frame by its time. The others (program and raw streams) miss it by
# some frames, since not every frame there has a time of its own.
_SEEKS = ("mov", "matroska", "avi", "flv", "mpegts", "ogg", "asf", "mxf", "nut")
_INDEXED = ("mov", "matroska", "avi")  # the first key frame, too, is found in an index
# Containers that state a duration of the file at most, sound included, or a rough one.
_STATES_NO_END = ("matroska", "flv", "asf", "mpeg")
SLACK = 0.05  # of a duration: headers are rounded, and the last frames may be missing
_FAR = 1 << 40  # ticks beyond the end of any file: 35 years in milliseconds, 141 days at 90 kHz


class ClipInfo(NamedTuple):
    """Duration and rate of the video stream, without sound that begins before or ends after it."""

    duration_secs: float
    fps: float  # the average; frames need not be evenly spaced
    num_frames: int | None  # None where the container does not say


class Source:
    """The video stream of a media file; `close` it at the end."""

    def __init__(self, media: Media):
        """Open a file and find its video.

        Raises:
          DecodeError: it has no video that can be decoded, or no duration.
          Exception: what FFmpeg and its bindings raise for a damaged file.
        """
        self._media = media
        self._open()
        try:
            fps = float(self.stream.average_rate or self.stream.guessed_rate or 25)
            self.info = ClipInfo(self._duration(fps), fps, self.stream.frames or None)
        except BaseException:
            self.close()
            raise

    @property
    def counts_frames(self) -> bool:
        """True for AVI, which has no times of presentation: frame i is shown as packet i is read.

        FFmpeg guesses such times, and is wrong where frames are reordered.
        """
        return self._format == "avi"

    @property
    def seeks(self) -> bool:
        """True if a key frame in the middle of the file can be found, with its exact time."""
        reorders = self.counts_frames and self.stream.codec_context.has_b_frames
        return self._format in _SEEKS and not reorders

    def packets(self) -> Iterator[av.Packet]:
        """Yield the packets of the video from where the file stands, then an empty one."""
        return _demux(self._container, self.stream)

    def seek(self, pts: int) -> None:
        """Move to a key frame at or before a tick, if there is one."""
        pts = max(pts, min(0, self.stream.start_time or 0))  # FLV knows no times below zero
        self._container.seek(pts, stream=self.stream, backward=True)

    def rewind(self) -> None:
        """Move to the first packet."""
        if self._format in _INDEXED and self.stream.start_time is not None:
            try:
                self.seek(self.stream.start_time)
                return  # and keep the index, which Matroska loads at the first seek
            except av.error.FFmpegError:
                pass
        self._reopen()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _open(self) -> None:
        # The protocol is named, since a file may be called "12:30.mp4".
        media = self._media
        file = io.BytesIO(media) if isinstance(media, bytes) else f"file:{media}"
        self._container = av.open(file, **_READ_ANY_METADATA)
        try:
            self.stream = self._find_stream()
        except BaseException:
            self.close()
            raise

    def _reopen(self) -> None:
        self.close()
        self._open()

    def _find_stream(self) -> av.VideoStream:
        stream = self._container.streams.best("video")
        if stream is None:
            raise DecodeError("without a video stream")
        if stream.disposition & av.stream.Disposition.attached_pic:
            raise DecodeError("without a video stream", "a cover picture and sound at most")
        if stream.codec_context is None:
            raise DecodeError("of a codec without a decoder")
        stream.codec_context.thread_count = 1  # the pipeline's workers are the parallelism
        return stream

    @property
    def _format(self) -> str:
        return self._container.format.name.split(",")[0]

    def _duration(self, fps: float) -> float:
        """Return the seconds from the first frame to the end of the last.

        Raises:
          DecodeError: the stream has no times.
        """
        container, stream = self._container, self.stream
        stated = float(stream.duration * stream.time_base) if stream.duration else 0.0
        if stated and self._format not in _STATES_NO_END:
            return stated
        stated = stated or (container.duration or 0) / av.time_base
        spans = self._measure(fps)  # opens the file again, so that the objects above are dead
        if self.stream.index not in spans:
            raise DecodeError("truncated" if stated else "without time stamps")
        start, end = spans[self.stream.index]
        if self.stream.start_time is not None:
            start = float(self.stream.start_time * self.stream.time_base)
        # The header counts from zero, or from the first frame: the file is cut if neither fits.
        last = max(end for _, end in spans.values())
        if self._format != "mpeg" and last + max(2 / fps, SLACK * stated) < stated:
            return stated - start
        return end - start

    def _measure(self, fps: float) -> dict[int, tuple[float, float]]:
        """Return the first and the last second of each stream's packets, as far as they are read.

        Those from the last key frame on are enough, if there is a way to get there; none is
        decoded.
        """
        if self._format in _SEEKS:
            try:
                self._container.seek(_FAR, stream=self.stream, backward=True)
            except av.error.FFmpegError:
                self._reopen()
        spans = self._read_spans(fps)
        if self.stream.index not in spans:  # the index leads beyond the end of a file that was cut
            self._reopen()
            spans = self._read_spans(fps)
        self.rewind()
        return spans

    def _read_spans(self, fps: float) -> dict[int, tuple[float, float]]:
        spans: dict[int, tuple[float, float]] = {}
        for packet in _demux(self._container):
            pts = packet.dts if packet.pts is None else packet.pts
            if pts is None:
                continue
            begin = end = float(pts * packet.time_base)
            if packet.duration:
                end += float(packet.duration * packet.time_base)
            elif packet.stream_index == self.stream.index:
                end += 1 / fps
            first, last = spans.get(packet.stream_index, (begin, end))
            spans[packet.stream_index] = min(first, begin), max(last, end)
        return spans


def _demux(container: av.container.InputContainer, *streams: av.VideoStream) -> Iterator[av.Packet]:
    """Yield packets until the end of the file.

    PyAV ends with an IndexError if a stream has appeared meanwhile, as in a damaged transport
    stream; the packets of the others are all read by then.
    """
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets, None)
        except IndexError:
            return
        if packet is None:
            return
        yield packet
