"""Time and size that checksums add to a checkpoint.

    python -m experiments.benchmarks.checkpoints --sizes B
    python -m experiments.benchmarks.checkpoints --sizes B --folder /scratch   # another disk

Saves and restores the state of a step (parameters and Adam's moments, random numbers in float32) as
training does, but waits for the end of each save. The time of the checksums is that of a pass over
the files alone, which the page cache still holds.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from data_pipelines.schema.checksum import SUMS, check_sums, write_sums
from experiments.benchmarks.cost import FULL, Size, base_config
from experiments.benchmarks.report import print_report, write_report
from vlmae.config.tree import override
from vlmae.runs.checkpoint import Checkpoints
from vlmae.runs.tables import markdown_table
from vlmae.training.step import make_init


def random_state(size: Size) -> PyTree:
    """Make the state of SMAUG with random numbers, which compress no better than trained ones."""
    config = override(base_config(size, 4, "float32"), FULL)
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == np.float32:
            return rng.standard_normal(x.shape, np.float32)
        return np.zeros(x.shape, x.dtype)

    return jax.tree.map(fill, jax.eval_shape(make_init(config), 0))


def measure(state: PyTree, folder: Path) -> dict[str, float]:
    """Measure seconds to save and restore a state, and to write and check its checksums alone."""
    secs = {}

    def timed(name: str, act: Callable[[], object]) -> None:
        start = time.perf_counter()
        act()
        secs[name] = time.perf_counter() - start

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(folder) as checkpoints:

        def save() -> None:
            checkpoints.save(1, state)
            checkpoints.manager.wait_until_finished()

        timed("save", save)
        timed("restore", lambda: checkpoints.restore(1, abstract))
    stored = folder / "checkpoints" / "1" / "state"
    sizes = {path: path.stat().st_size for path in stored.rglob("*") if path.is_file()}
    sums = sizes.pop(stored / SUMS)
    timed("check", lambda: check_sums(stored))
    (stored / SUMS).unlink()
    timed("write", lambda: write_sums(stored))
    return secs | {"gib": sum(sizes.values()) / 2**30, "sums_bytes": sums}


def format_table(rows: list[dict]) -> str:
    """Format medians and ranges in seconds."""
    head = ["ViT", "GiB", "save", "of it checksums", "restore", "of it checksums", "bytes of them"]
    lines = []
    for row in rows:
        found = {name: [run[name] for run in row["runs"]] for name in row["runs"][0]}
        cells = [
            f"{statistics.median(found[name]):.2f} ({min(found[name]):.2f}-{max(found[name]):.2f})"
            for name in ("save", "write", "restore", "check")
        ]
        size, sums = found["gib"][0], found["sums_bytes"][0]
        lines.append([f"{row['size']}/16", f"{size:.2f}", *cells, f"{sums:,}"])
    return markdown_table([head, *lines])


def main(
    sizes: tuple[Size, ...] = ("B",),
    repeats: int = 3,
    folder: Path | None = None,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table and write checkpoints.md and checkpoints.json.

    Args:
      sizes: S and B, or one of them.
      repeats: of each.
      folder: on the disk to measure; the folder of temporary files by default.
      out_dir: where the table goes.
    """
    rows = []
    for size in sizes:
        state, row = random_state(size), {"size": size, "runs": []}
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                row["runs"].append(measure(state, Path(place)))
        rows.append(row)
    settings = {"repeats": repeats}
    write_report(out_dir, "checkpoints", format_table(rows), settings, rows=rows)
    print_report(format_table(rows), settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
