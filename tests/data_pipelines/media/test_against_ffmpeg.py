"""Our frames against those that ffmpeg's own program shows, at the times that it states.

A file of each kind that differs in how it is sought runs by default, all others are slow. Skipped
where there is no ffmpeg: imageio-ffmpeg, of the test extra, brings one.
"""

import importlib.util
import re
import shutil
import subprocess

import numpy as np
import pytest

from data_pipelines.media import decode
from data_pipelines.media.sampling import segment_times

NUM_FRAMES, HEIGHT, WIDTH = 50, 32, 64
H264 = "-c:v libx264 -pix_fmt yuv420p -crf 4 -bf 3 -g 12"
FILES = {  # name -> how ffmpeg writes it
    **{f"h264.{ending}": H264 for ending in ("mp4", "mov", "mkv", "flv", "ts", "m2ts", "nut")},
    "fragments.mp4": f"{H264} -movflags frag_keyframe+empty_moov+default_base_moof",
    "index_first.mp4": f"{H264} -movflags faststart",
    "hevc.mp4": "-c:v libx265 -crf 4 -pix_fmt yuv420p -x265-params log-level=none",
    "ten_bits.mkv": "-c:v libx265 -crf 4 -pix_fmt yuv420p10le -x265-params log-level=none",
    "vp8.webm": "-c:v libvpx -b:v 2M -deadline realtime",
    "vp9.webm": "-c:v libvpx-vp9 -b:v 2M -deadline realtime",
    "live.webm": "-c:v libvpx-vp9 -b:v 2M -deadline realtime -live 1",
    "alpha.webm": "-c:v libvpx-vp9 -b:v 2M -pix_fmt yuva420p -deadline realtime",
    "av1.mkv": "-c:v libsvtav1 -crf 10 -preset 10 -svtav1-params lookahead=0",
    "mpeg4.mp4": "-c:v mpeg4 -bf 2 -q:v 1",
    "mpeg1.mpg": "-c:v mpeg1video -q:v 1",
    "mpeg2.mpg": "-c:v mpeg2video -bf 2 -q:v 1",
    "mpeg2.ts": "-c:v mpeg2video -bf 2 -q:v 1",
    "mpeg2.mxf": "-c:v mpeg2video -q:v 1",
    "wmv2.wmv": "-c:v wmv2 -q:v 1",
    "msmpeg4.asf": "-c:v msmpeg4 -q:v 1",
    "theora.ogv": "-c:v libtheora -q:v 10",
    "sorenson.flv": "-c:v flv -q:v 1",
    "motion_jpeg.avi": "-c:v mjpeg -q:v 1 -pix_fmt yuvj420p",
    "mpeg4.avi": "-c:v mpeg4 -q:v 1",
    "full_range.mkv": f"{H264} -color_range pc -vf scale=out_range=pc",
    "bt709.mp4": f"{H264} -colorspace bt709 -vf scale=out_color_matrix=bt709",
    "yuv444.mp4": "-c:v libx264 -pix_fmt yuv444p -crf 4",
    "yuv422.mkv": "-c:v libx264 -pix_fmt yuv422p10le -crf 4",
    "rgb.mkv": "-c:v libx264rgb -crf 4",
    "gray.mkv": "-c:v libx264 -pix_fmt gray -crf 4",
    "prores.mov": "-c:v prores_ks",
    "lossless.mkv": "-c:v ffv1",
    "apng.apng": "-f apng",
    "gif.gif": "-f gif",
    "late.mkv": f"{H264} -output_ts_offset 10",
    "late.ts": f"{H264} -output_ts_offset 10",
    "uneven.mkv": f"{H264} -vf select=not(mod(n\\,3))+not(mod(n\\,7)) -fps_mode vfr",
    "uneven.mp4": f"{H264} -vf select=not(mod(n\\,3))+not(mod(n\\,7)) -fps_mode vfr",
    "oblong.mkv": f"{H264} -vf setsar=4/3",
    "tall.mp4": f"{H264} -vf setsar=3/4",
    "ntsc.mp4": f"{H264} -vf setpts=N*1001/30000/TB,settb=1/30000 -r 30000/1001",
}
QUICK = ("h264.mp4", "h264.mkv", "h264.ts", "vp9.webm", "live.webm", "mpeg4.avi", "tall.mp4")
TURNS = {f"turned_{d}{f}": (d, f) for d in (90, 180, 270) for f in ("", "h", "v")}


def ffmpeg_program() -> str | None:
    found = shutil.which("ffmpeg")
    if found or not importlib.util.find_spec("imageio_ffmpeg"):
        return found
    return importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()


pytestmark = pytest.mark.skipif(ffmpeg_program() is None, reason="no ffmpeg")


def ffmpeg(*arguments: object, data: bytes = b"") -> subprocess.CompletedProcess:
    command = [ffmpeg_program(), "-hide_banner", "-y", *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, check=True)


def write(path, options: str, frames: np.ndarray) -> None:
    raw = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r 25 -i -".split()
    try:
        ffmpeg(*raw, *options.split(), path, data=frames.tobytes())
    except subprocess.CalledProcessError as error:
        if b"Unknown encoder" in error.stderr:
            pytest.skip("this ffmpeg has no such encoder")
        raise AssertionError(error.stderr.decode()) from error


def reference(path, shape: tuple[int, int]) -> tuple[list[float], np.ndarray]:
    """Times and frames of the whole file as ffmpeg shows them, with square pixels."""
    height, width = shape
    done = ffmpeg(
        *("-i", path, "-map", "0:v", "-fps_mode", "passthrough", "-pix_fmt", "rgb24"),
        *("-vf", f"showinfo,scale={width}:{height}:flags=bicubic", "-f", "rawvideo", "-"),
    )
    times = [float(t) for t in re.findall(rb" pts_time:(\S+)", done.stderr)]
    return times, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def assert_shown(path, tolerance: float = 4) -> None:
    """Sampled, in order and in any order, our frames are ffmpeg's at the same times."""
    with decode.open_clip(path) as clip:
        times, expected = reference(path, clip.size)
        starts = np.array(times) - times[0]
        assert len(starts) == len(expected) > 10
        ends = np.append(starts[1:], clip.info.duration_secs)
        last = ends[-1] - starts[-1]
        assert 0 < last < 0.2, "the duration is where the last frame ends"
        middles = (starts + ends) / 2
        rng = np.random.default_rng(0)
        for places in (
            np.arange(len(starts)),
            *(rng.integers(0, len(starts), 4) for _ in range(6)),
        ):
            shown = clip.frames(middles[places]).astype(int)
            errors = np.abs(shown - expected[places]).mean(axis=(1, 2, 3))
            assert errors.max() < tolerance, (places[errors.argmax()], errors.max())
        for count in (4, 8):
            wanted = segment_times(clip.info.duration_secs, count)
            places = np.searchsorted(starts, wanted + 1e-4, side="right") - 1
            errors = np.abs(clip.frames(wanted).astype(int) - expected[places]).mean(axis=(1, 2, 3))
            assert errors.max() < tolerance


def slow_unless_quick(names, quick) -> list:
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", slow_unless_quick(FILES, QUICK))
def test_files_of_every_container_and_codec(tmp_path, numbered_frames, name):
    path = tmp_path / name
    write(path, FILES[name], numbered_frames(NUM_FRAMES))
    # Palettes of 256 colors are dithered in another order.
    assert_shown(path, 8 if name == "gif.gif" else 4)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("turn", slow_unless_quick(TURNS, ("turned_90", "turned_270h")))
def test_turned_files(tmp_path, numbered_frames, turn, ending):
    degrees, flips = TURNS[turn]
    stored, path = tmp_path / "stored.mp4", tmp_path / f"{turn}.{ending}"
    write(stored, H264, numbered_frames(NUM_FRAMES))
    flags = [flag for kind in flips for flag in (f"-display_{kind}flip",)]
    ffmpeg("-display_rotation", degrees, *flags, "-i", stored, "-c", "copy", path)
    with decode.open_clip(path) as clip:
        assert clip.size == ((WIDTH, HEIGHT) if degrees != 180 else (HEIGHT, WIDTH))
    assert_shown(path)


@pytest.mark.parametrize(
    "ending", slow_unless_quick(["mp4", "mkv", "ts", "flv", "mov", "nut"], ("mkv", "ts"))
)
@pytest.mark.parametrize(("offset", "secs"), [(0, 5), (1.5, 5), (0, 0.5)])
def test_files_with_sound(tmp_path, numbered_frames, ending, offset, secs):
    silent, path = tmp_path / "silent.mp4", tmp_path / f"sound.{ending}"
    write(silent, H264, numbered_frames(NUM_FRAMES))
    ffmpeg(
        *("-f", "lavfi", "-i", f"sine=d={secs}", "-itsoffset", offset, "-i", silent),
        *("-map", "1:v", "-map", "0:a", "-c:v", "copy", "-c:a", "aac", "-ar", 44100, path),
    )
    assert decode.probe(path).duration_secs == pytest.approx(2, abs=0.002)
    assert_shown(path)
