"""Clips a second of the input pipeline, against decord, PyAV and WebDataset in torch's DataLoader.

    pip install decord webdataset
    python -m experiments.benchmarks.input
    python -m experiments.benchmarks.input --folder VIDEOS --frames 8

All pipelines get the same clips, crops and number of workers; ours also tokenizes captions.
The clips are those of `experiments.benchmarks.decoding`, or of a folder; ours reads them as they
are, encoded again, and as pictures, which WebDataset reads from a tar file. A round opens every
pipeline in turn, drops the batches that its workers prefetch, times some more, and closes it, so
that none works while another one is timed. Ratios compare within a round. They are of the time of
the processors, of all processes of a pipeline, so that other work on the machine disturbs little.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipelines.loading.pipeline import train_batches
from data_pipelines.media.reencode import Reencode
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.stored import open_source
from experiments.benchmarks.decoding import OTHER_FORM, make_clip, read_folder
from experiments.benchmarks.loaders import READERS, torch_batches, webdataset_batches, write_tar
from experiments.benchmarks.report import compare, format_ratio, print_report, write_report
from vlmae.runs.tables import markdown_table
from vlmae.training.num_workers import MADE_AHEAD, num_cores

# Of the data set, for ours: grain takes milliseconds to shuffle a set of a few clips.
REPEATS = 64


def write_clips(clips: Sequence[bytes], folder: Path) -> list[Path]:
    """Write the clips as files, with a manifest for our builder."""
    paths = [folder / f"{i}.mp4" for i in range(len(clips))]
    for path, media in zip(paths, clips, strict=True):
        path.write_bytes(media)
    lines = [json.dumps({"media": path.name, "caption": "a disk that moves"}) for path in paths]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return paths


def store(folder: Path, name: str, reencode: Reencode | None) -> None:
    """Prepare a data set of the manifest in a folder."""
    splits = {"train": folder / "manifest.jsonl"}
    prepare("manifest", folder, name=name, splits=splits, reencode=reencode)


def our_batches(folder: Path, config: DataConfig, name: str) -> Iterator:
    """Endless batches of our pipeline from a data set that `store` made."""
    split = "+".join(["train"] * REPEATS)
    source = SourceConfig(name, split, num_frames=config.train[0].num_frames)
    own = dataclasses.replace(config, train=(source,), data_dir=str(folder))
    with train_batches(own, 0, seed=0) as batches:  # ends its workers when the generator is closed
        yield from batches


class Spent(NamedTuple):
    """Seconds of the processors and of the clock."""

    processor: float
    clock: float


def time_batches(batches: Iterator, skip: int, count: int) -> Spent:
    """Measure what `count` batches take, after `skip` that do not count."""
    for _ in range(skip):
        next(batches)
    start, began = processor_secs(), time.perf_counter()
    for _ in range(count):
        next(batches)
    return Spent(processor_secs() - start, time.perf_counter() - began)


def processor_secs() -> float:
    """Return the processor time of this process and of those that it has started (Linux)."""
    pid = os.getpid()
    started = Path(f"/proc/{pid}/task").glob("*/children")
    children = {int(child) for task in started for child in task.read_text().split()}
    return sum(_processor_secs(process) for process in (pid, *children))


def _processor_secs(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # has ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    makers: dict[str, Callable[[], Iterator]], rounds: int, skip: int, count: int
) -> dict[str, list[Spent]]:
    """Measure every pipeline in every round, one pipeline at a time."""
    secs: dict[str, list[Spent]] = {name: [] for name in makers}
    for number in range(rounds):
        for name, make in makers.items():
            with contextlib.closing(make()) as batches:
                secs[name].append(time_batches(batches, skip, count))
        print(f"round {number + 1} of {rounds}", flush=True)
    return secs


def rows_of(secs: dict[str, list[Spent]], clips: int) -> list[dict]:
    """Clips a second and core of each pipeline, with its ratio to the first; clips a second."""
    first = [spent.processor for spent in next(iter(secs.values()))]
    rows = []
    for name, all_spent in secs.items():
        own = [spent.processor for spent in all_spent]
        rows.append(
            {
                "pipeline": name,
                "clips_per_sec_and_core": clips / statistics.median(own),
                "clips_per_sec": clips / statistics.median(spent.clock for spent in all_spent),
                **compare(first, own),
            }
        )
    return rows


def format_table(rows: list[dict]) -> str:
    """Format a table whose ratios compare with the first row."""
    cells = [
        [
            r["pipeline"],
            f"{r['clips_per_sec_and_core']:.1f}",
            format_ratio(r),
            f"{r['clips_per_sec']:.1f}",
        ]
        for r in rows
    ]
    head = ["pipeline", "clips a second and core", "x (range)", "clips a second"]
    return markdown_table([head, *cells])


def main(
    frames: int = 4,
    clips: int = 32,
    batch_size: int = 8,
    batches: int = 8,
    rounds: int = 5,
    workers: int = 0,
    folder: Path | None = None,
    reencode: Reencode = OTHER_FORM,
    quality: int = Reencode.quality,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table and write input.md and input.json.

    Args:
      frames: sampled of each clip.
      clips: how many are made, or read from the folder.
      batch_size: clips in a batch.
      batches: of each pipeline that are timed in a round.
      rounds: of all pipelines.
      workers: processes that decode; 0: one for each core.
      folder: videos to measure with, in place of those made here.
      reencode: the form of clips encoded again; the pictures have its size and rate.
      quality: of the pictures.
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
        pictures = dataclasses.replace(reencode, store="frames", quality=quality)
        store(folder_made, "pictures", pictures)
        records = open_source(SourceConfig("pictures"), folder_made)
        write_tar([records[i]["media"] for i in range(len(records))], folder_made / "clips.tar")
        makers = {
            f"{reader}, files as they are": lambda reader=reader: torch_batches(
                paths, reader, config
            )
            for reader in READERS
        }
        makers["ours, stored as they are"] = lambda: our_batches(folder_made, config, "stored")
        makers[f"ours, {reencode}"] = lambda: our_batches(folder_made, config, "encoded")
        makers["WebDataset, frames"] = lambda: webdataset_batches(folder_made / "clips.tar", config)
        makers["ours, frames"] = lambda: our_batches(folder_made, config, "pictures")
        secs = measure(makers, rounds, MADE_AHEAD * workers, batches)
    rows = rows_of(secs, batch_size * batches)
    settings = {"frames": frames, "clips": len(media), "batch_size": batch_size, "cores": cores}
    settings |= {"batches": batches, "rounds": rounds, "workers": workers}
    settings |= {"folder": folder and str(folder), "quality": quality}
    write_report(out_dir, "input", format_table(rows), settings, secs=secs, rows=rows)
    print_report(format_table(rows), settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
