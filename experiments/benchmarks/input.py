"""Clips a second that come out of the pipeline: ours against decord and PyAV in torch's DataLoader.

    pip install decord
    python -m experiments.benchmarks.input
    python -m experiments.benchmarks.input --folder VIDEOS --frames 8

The same clips, crops and number of worker processes for all; ours also turns captions into words.
The clips are those of `experiments.benchmarks.decoding`, or of a folder; ours reads them as they
are, and encoded again. Measured in rounds, each of which opens every pipeline in turn, takes what
its workers may have made before anybody asked, times some batches more, and closes it: none works
while another one is timed. Ratios compare within a round.
"""

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.pipeline import train_batches
from data_pipelines.prepare import prepare
from data_pipelines.reencode import Reencode
from experiments.benchmarks.decoding import OTHER_FORM, make_clip, read_folder
from experiments.benchmarks.loaders import READERS, torch_batches
from experiments.benchmarks.report import compare, print_report, write_report
from vlmae.find_num_workers import MADE_AHEAD, num_cores


def write_clips(clips: Sequence[bytes], folder: Path) -> list[Path]:
    """Files, and a manifest of them for our builder."""
    paths = [folder / f"{i}.mp4" for i in range(len(clips))]
    for path, media in zip(paths, clips, strict=True):
        path.write_bytes(media)
    lines = [json.dumps({"media": path.name, "caption": "a disk that moves"}) for path in paths]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return paths


def store(folder: Path, name: str, reencode: Reencode | None) -> None:
    """Makes a data set of the manifest in a folder."""
    splits = {"train": folder / "manifest.jsonl"}
    prepare("manifest", folder, name=name, splits=splits, reencode=reencode)


def our_batches(folder: Path, config: DataConfig, name: str) -> Iterator:
    """Endless batches of our pipeline from a data set that `store` made."""
    source = SourceConfig(name, num_frames=config.train[0].num_frames)
    own = dataclasses.replace(config, train=(source,), data_dir=str(folder))
    with train_batches(own, 0, seed=0) as batches:
        yield from batches


def time_batches(batches: Iterator, skip: int, count: int) -> float:
    """Seconds for so many batches, after some that do not count."""
    for _ in range(skip):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - start


def measure(
    makers: dict[str, Callable[[], Iterator]], rounds: int, skip: int, count: int
) -> dict[str, list[float]]:
    """Seconds of every pipeline in every round; there is one of them at a time."""
    secs: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(rounds):
        for name, make in makers.items():
            with contextlib.closing(make()) as batches:
                secs[name].append(time_batches(batches, skip, count))
        print(f"round {number + 1} of {rounds}", flush=True)
    return secs


def rows_of(secs: dict[str, list[float]], clips: int, cores: int) -> list[dict]:
    """Clips a second and core, and how many times as many as the first pipeline's."""
    first, rows = next(iter(secs.values())), []
    for name, own in secs.items():
        rows.append(
            {
                "pipeline": name,
                "clips_per_sec_and_core": clips / statistics.median(own) / cores,
                **compare(first, own),
            }
        )
    return rows


def format_table(rows: list[dict]) -> str:
    """Markdown; "x" compares with the first row."""
    lines = ["| pipeline | clips a second and core | x (range) |", "|---|---|---|"]
    for r in rows:
        low, high = r["ratio_range"]
        rate, ratio = r["clips_per_sec_and_core"], r["ratio"]
        lines.append(f"| {r['pipeline']} | {rate:.1f} | {ratio:.2f} ({low:.2f}-{high:.2f}) |")
    return "\n".join(lines)


def main(
    frames: int = 4,
    clips: int = 32,
    batch_size: int = 8,
    batches: int = 8,
    rounds: int = 5,
    workers: int = 0,
    folder: Path | None = None,
    reencode: Reencode = OTHER_FORM,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Prints the table and writes input.md and input.json.

    Args:
      frames: sampled of each clip.
      clips: how many are made, or read from the folder.
      batch_size: clips in a batch.
      batches: of each pipeline that are timed in a round.
      rounds: of all pipelines.
      workers: processes that decode; 0: one for each core.
      folder: videos to measure with, in place of those made here.
      reencode: the other form of storage.
      out_dir: where the table goes.
    """
    cores = num_cores()
    workers = workers or cores
    config = DataConfig(
        train=(SourceConfig(num_frames=frames),), batch_size=batch_size, num_workers=workers
    )
    media = read_folder(folder, clips) if folder else [make_clip(i) for i in range(clips)]
    with tempfile.TemporaryDirectory() as made:
        folder_made = Path(made)
        paths = write_clips(media, folder_made)
        store(folder_made, "stored", None)
        store(folder_made, "encoded", reencode)
        makers = {
            f"{reader}, files as they are": lambda reader=reader: torch_batches(
                paths, reader, config
            )
            for reader in READERS
        }
        makers["ours, stored as they are"] = lambda: our_batches(folder_made, config, "stored")
        makers[f"ours, {reencode}"] = lambda: our_batches(folder_made, config, "encoded")
        secs = measure(makers, rounds, MADE_AHEAD * workers, batches)
    rows = rows_of(secs, batch_size * batches, cores)
    settings = {"frames": frames, "clips": len(media), "batch_size": batch_size, "cores": cores}
    settings |= {"batches": batches, "rounds": rounds, "workers": workers}
    settings |= {"folder": folder and str(folder)}
    write_report(out_dir, "input", format_table(rows), settings, secs=secs, rows=rows)
    print_report(format_table(rows), settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
