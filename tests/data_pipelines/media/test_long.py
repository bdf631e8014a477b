"""Few frames of short, long and hour-long files: the right ones, without decoding it all."""

import time

import numpy as np
import pytest

from data_pipelines.media import decode
from data_pipelines.media.sampling import segment_times

HOUR = ["mp4", "matroska", "webm", "mpegts", "flv", "avi", "mpeg"]
SEEKING = {"mp4", "matroska", "webm", "flv", "avi"}
CODECS = {"webm": "libvpx", "avi": "mpeg4", "mpeg": "mpeg2video"}


@pytest.fixture
def num_reads(monkeypatch) -> list[int]:
    reads, read = [], decode.Clip._read
    monkeypatch.setattr(decode.Clip, "_read", lambda self: reads.append(1) or read(self))
    return reads


def check_sampled(clip, step_ms: int, secs: float, read_numbers, tolerance: int = 0) -> None:
    duration = decode.probe(clip).duration_secs
    assert duration == pytest.approx(secs, abs=0.2)
    rng = np.random.default_rng(0)
    for count in (4, 8):
        for times in (segment_times(duration, count), segment_times(duration, count, rng)):
            # The middle of a frame, since containers round their times.
            places = np.minimum(times * 1000 // step_ms, secs * 1000 // step_ms - 1).astype(int)
            frames = decode.decode_frames(clip, (places + 0.5) * step_ms / 1000)
            errors = np.array(read_numbers(frames)) - (places & 255)
            assert np.abs(errors).max() <= tolerance, errors


@pytest.mark.parametrize("container", HOUR)
@pytest.mark.parametrize("secs", [0.4, 9.6])
def test_short_files(write_clip, read_numbers, container, secs):
    times_ms = range(0, int(secs * 1000), 40)
    clip = write_clip(times_ms, container, CODECS.get(container, "libx264"), gop=25, bf=0)
    check_sampled(clip, 40, secs, read_numbers)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("container", HOUR)
def test_files_of_an_hour(write_clip, read_numbers, num_reads, container):
    times_ms = range(0, 3_600_000, 40)
    clip = write_clip(times_ms, container, CODECS.get(container, "libx264"), gop=100, bf=0)
    num_reads.clear()
    start = time.process_time()
    # Few frames of a program stream have a time; FFmpeg guesses the others, at times wrong by one.
    check_sampled(clip, 40, 3600, read_numbers, tolerance=int(container == "mpeg"))
    print(f"{container}: {(time.process_time() - start) / 24:.3f} s of the processor a frame")
    if container in SEEKING:
        assert len(num_reads) < 24 * 120, "about one key frame apart for each of 24 frames"
