"""Cost of sampling a few frames of a clip, stored as it is or encoded again.

    python -m experiments.benchmarks.decoding
    python -m experiments.benchmarks.decoding --folder VIDEOS --reencode.short-side 256

The clips are those of a folder, or made here: grainy noise that moves, 320x240, 25 frames per
second, 10 s, encoded as web video is (B-frames, a key frame every 250). Frames are sampled at
random times by the code that training uses: decoded and converted to RGB, not yet cropped. The
figures are processor time of one thread, so other jobs disturb little. A ratio compares both forms
in the same round, at the same times; the report shows the median over the rounds.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.loading.rows import load_video
from data_pipelines.media.decode import DecodeError
from data_pipelines.media.endings import VIDEO_ENDINGS, ending
from data_pipelines.media.reencode import Reencode
from data_pipelines.media.reencode import reencode as encode_media
from data_pipelines.media.video_writer import encode_video
from data_pipelines.schema.checks import MissingError, UserError
from experiments.benchmarks.report import compare, print_report, write_report
from vlmae.runs.tables import markdown_table

WIDTH, HEIGHT, FPS, SECS = 320, 240, 25, 10
WEB_GOP, WEB_CRF = 250, 23  # what x264 does unless told otherwise
REACH = 64  # pixels that the camera moves to each side
OTHER_FORM = Reencode(short_side=224, fps=8, key_frames=8)
GRAIN = 14  # of 255: gives 350 kbit/s, as web video of this size has; none gives a fourth of that


def make_clip(seed: int) -> bytes:
    """Encode a clip: a camera sways over a noise texture, a disk of another texture crosses."""
    return encode_video(render(seed, SECS * FPS), FPS, gop=WEB_GOP, crf=WEB_CRF)


def render(seed: int, num_frames: int) -> UInt8[np.ndarray, "t {HEIGHT} {WIDTH} 3"]:
    """Render the frames of `make_clip`."""
    rng = np.random.default_rng(seed)
    scene, disk = texture(rng), texture(rng)[:HEIGHT, :WIDTH]
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    sway = 2 * np.pi * (rng.uniform(0.05, 0.15, 2) * np.arange(num_frames)[:, None] / FPS)
    offsets = np.rint(REACH * (1 + np.sin(sway + rng.uniform(0, 2 * np.pi, 2)))).astype(int)
    frames = np.empty((num_frames, HEIGHT, WIDTH, 3), np.uint8)
    for i, (top, left) in enumerate(offsets):
        center = WIDTH * (0.1 + 0.8 * i / num_frames), HEIGHT / 2
        inside = np.hypot(x - center[0], y - center[1]) < HEIGHT / 5
        window = scene[top : top + HEIGHT, left : left + WIDTH]
        grain = rng.integers(-GRAIN, GRAIN + 1, window.shape, np.int16)
        frames[i] = np.clip(np.where(inside[..., None], disk, window) + grain, 0, 255)
    return frames


def texture(rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """Noise at four scales, the coarse ones stronger; large enough for the camera's way."""
    size = WIDTH + 2 * REACH, HEIGHT + 2 * REACH
    total = np.zeros((size[1], size[0], 3), np.float32)
    for scale in (2, 8, 32, 128):
        noise = rng.integers(0, 256, (size[1] // scale + 1, size[0] // scale + 1, 3), np.uint8)
        total += scale**0.5 * np.asarray(Image.fromarray(noise).resize(size), np.float32)
    low, high = total.min(), total.max()
    return np.rint(255 * (total - low) / (high - low)).astype(np.uint8)


def read_folder(folder: Path, limit: int) -> list[bytes]:
    """Read the first videos of a folder and its subfolders, by name.

    Raises:
      MissingError: there is none.
    """
    paths = sorted(path for path in folder.rglob("*") if ending(path) in VIDEO_ENDINGS)
    if not paths:
        raise MissingError(f"{folder}: no videos ({', '.join(VIDEO_ENDINGS)})")
    print(f"{folder}: {min(limit, len(paths))} of {len(paths)} videos", flush=True)
    return [path.read_bytes() for path in paths[:limit]]


def sample_secs(clips: Sequence[bytes], num_frames: int, seed: int) -> float:
    """Processor seconds to sample every clip once."""
    start = time.process_time()
    for i, media in enumerate(clips):
        record = {"media": media, "media_type": b"video"}
        load_video(record, num_frames, np.random.default_rng((seed, i)))
    return time.process_time() - start


def measure(forms: dict[str, list[bytes]], num_frames: int, rounds: int) -> list[dict]:
    """Measure each form: clips per second and core, with its ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(1 + rounds):  # the first round only warms up
        for name, clips in forms.items():
            secs = sample_secs(clips, num_frames, number)
            times[name] += [secs] * (number > 0)
    return [row(name, len(clips), num_frames, times) for name, clips in forms.items()]


def row(name: str, num_clips: int, num_frames: int, times: dict[str, list[float]]) -> dict:
    """Collect the figures of one form from the seconds of all forms, round by round."""
    first = next(iter(times))
    return {
        "form": name,
        "num_frames": num_frames,
        "clips_per_sec": num_clips / statistics.median(times[name]),
        **compare(times[first], times[name]),
    }


def format_table(rows: Sequence[dict], kib_per_clip: dict[str, float]) -> str:
    """Format a table: a row for each form, a column for each number of frames."""
    counts = list(dict.fromkeys(r["num_frames"] for r in rows))
    head = ["clips per second and core (x: range)", "KiB a clip"]
    lines = []
    for form, kib in kib_per_clip.items():
        cells = [
            f"{r['clips_per_sec']:.1f} ({r['ratio']:.1f}x: {low:.1f}-{high:.1f})"
            for r in rows
            if r["form"] == form
            for low, high in [r["ratio_range"]]
        ]
        lines.append([form, f"{kib:,.0f}", *cells])
    return markdown_table([[*head, *(f"{count} frames" for count in counts)], *lines])


def encode_again(clips: Sequence[bytes], setting: Reencode) -> list[bytes]:
    """Encode all clips in the other form, and print the time that it takes.

    Raises:
      UserError: a clip cannot be decoded; says which one.
    """
    start, encoded = time.process_time(), []
    for i, media in enumerate(clips):
        try:
            encoded.append(encode_media(media, "video", setting))
        except DecodeError as error:
            raise UserError(f"clip {i} of {len(clips)}: {error}") from error
    secs = (time.process_time() - start) / len(clips)
    print(f"encoding again took {secs:.1f} s of the processor a clip", flush=True)
    return encoded


def main(
    frames: tuple[int, ...] = (4, 8, 16),
    clips: int = 8,
    rounds: int = 5,
    folder: Path | None = None,
    reencode: Reencode = OTHER_FORM,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table and write decoding.md and decoding.json.

    Args:
      frames: how many are sampled of each clip.
      clips: how many are made, or read from the folder.
      rounds: measured rounds, after one that warms up.
      folder: videos to measure with, in place of those made here.
      reencode: the other form.
      out_dir: where the table goes.
    """
    original = read_folder(folder, clips) if folder else [make_clip(i) for i in range(clips)]
    forms = {"as they are": original, str(reencode): encode_again(original, reencode)}
    kib = {name: sum(map(len, media)) / len(media) / 1024 for name, media in forms.items()}
    rows = [r for count in frames for r in measure(forms, count, rounds)]
    table = format_table(rows, kib)
    settings = {"clips": len(original), "rounds": rounds, "folder": folder and str(folder)}
    write_report(out_dir, "decoding", table, settings, kib_per_clip=kib, rows=rows)
    print_report(table, settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
