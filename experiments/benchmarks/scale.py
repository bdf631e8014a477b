"""Growth of what surrounds training: time and memory at three sizes, and the exponent.

    python -m experiments.benchmarks.scale                    # all cases
    python -m experiments.benchmarks.scale --case ranks --out-dir runs/benchmarks

Each measurement is a process of its own. Time is CPU time of all threads, which other work on the
machine hardly changes; memory is the peak above what the imports and the inputs take. Inputs are
made up. The exponent is the slope between the two largest sizes, both in logarithms.
`experiments.benchmarks.evaluation_processes` measures an evaluation by several processes.
"""

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from experiments.benchmarks.own_process import in_own_process, peak_resident_bytes, resident_bytes
from experiments.benchmarks.report import print_report, write_report
from vlmae.runs.tables import markdown_table

LABELS = 3142  # HVU's
DIM = 256
LINES = 300  # of a run's metrics
STEPS = 50  # in which an index is built
TOP_K = 128

Prepared = Callable[[], dict[str, Any] | None]  # measured; returns more results


def embeddings(count: int, seed: int) -> np.ndarray:
    """Draw unit vectors."""
    x = np.random.default_rng(seed).standard_normal((count, DIM), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def made_up_pairs(count: int):
    """Make texts that lie near their clips, both directions of retrieval, and temperatures."""
    from data_pipelines.schema.records import Texts
    from vlmae.evaluation.encode import Encoded
    from vlmae.evaluation.retrieval import make_directions

    places = np.arange(count)
    clips = Encoded(embeddings(count, 0), None, places, places)
    near = embeddings(count, 1) + 0.5 * clips.embeddings
    texts = Encoded(near, None, places, places)
    tokens = np.zeros((count, 1), np.int32)
    captions = Texts(tokens, tokens > 0, places, places, tuple(map(str, places)))
    return make_directions(texts, places, captions, clips), captions, clips


def ranks(count: int) -> Prepared:
    """Rank both ways, without scoring again, at a given temperature."""
    from vlmae.evaluation.retrieval import rank

    directions, captions, _ = made_up_pairs(count)
    temperatures = dict.fromkeys(directions, 0.05)
    return lambda: _drop(rank(directions, captions.rows, temperatures))


def retrieval(count: int) -> Prepared:
    """Evaluate retrieval but for the model: temperatures, ranks, scoring again, predictions."""
    from vlmae.evaluation.metrics import rank_metrics
    from vlmae.evaluation.ranking import best_temperature
    from vlmae.evaluation.retrieval import describe, rank, rank_intervals

    directions, captions, clips = made_up_pairs(count)
    names = tuple(f"clip{i}.mp4" for i in range(count))

    def match(pairs: np.ndarray) -> np.ndarray:
        return np.random.default_rng(0).standard_normal(len(pairs), np.float32)

    def run() -> None:
        fitted = {name: best_temperature(x) for name, x in directions.items()}
        ranked = rank(directions, captions.rows, fitted, TOP_K, match)
        for name, direction in directions.items():
            rank_metrics(ranked[name].ranks)
            rank_intervals(name, ranked[name], direction.media_ids)
        describe(ranked["t2v"], directions["t2v"].right, captions, clips, names)

    return run


def label_interval(count: int) -> Prepared:
    """Compute mAP, F1 and their intervals of 3,142 labels, each of 0.5 % of the clips."""
    from vlmae.evaluation.intervals import label_intervals
    from vlmae.evaluation.labels import mean_average_precision
    from vlmae.evaluation.metrics import f1_scores

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((count, LABELS), np.float32)
    correct = rng.random((count, LABELS), np.float32) < 0.005

    def run() -> None:
        mean_average_precision(logits, correct)
        f1_scores(logits > 0, correct)
        label_intervals(logits, logits > 0, correct, np.arange(count))

    return run


def questions(count: int) -> Prepared:
    """Draw a multiple-choice question for every caption."""
    from data_pipelines.schema.records import Texts
    from vlmae.evaluation.multiple_choice import draw_questions

    ids = np.random.default_rng(0).integers(0, 8000, (count, 32), np.int32)
    rows = np.arange(count, dtype=np.int32)
    texts = Texts(ids, np.ones(ids.shape, bool), rows, rows, tuple(map(str, rows)))
    return lambda: _drop(draw_questions(texts, 4))


def search_index(count: int) -> Prepared:
    """Build a stored index in 50 steps, read it, and query it."""
    from vlmae.search.index import (
        Block,
        FileFacts,
        Index,
        block_paths,
        load_index,
        save_block,
        search,
    )

    files = tuple(FileFacts(f"{i // 1000:04d}/clip_{i:08d}.mp4", i, i) for i in range(count))
    vectors, step = embeddings(count, 0), math.ceil(count / STEPS)

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            for first in range(0, count, step):
                part = Index("", files[first : first + step], vectors[first : first + step])
                save_block(Block(part, replaces=not first), Path(folder))
            built = time.process_time()
            written = sum(path.stat().st_size for path in block_paths(Path(folder)))
            index = load_index(Path(folder))
            read = time.process_time()
            search(index, vectors[0], 5)
            queried = time.process_time()
        spent = {"build": built - start, "read": read - built, "query": queried - read}
        return {"seconds": spent, "bytes_written": written}

    return run


def make_runs(count: int, root: Path) -> list[Path]:
    """Write runs that have not ended, each of 300 lines of metrics."""
    from vlmae.config.experiment import ExperimentConfig

    names = [f"loss/part{i}" for i in range(20)] + ["loss/total", "speed/clips_per_sec"]
    names += ["speed/secs_per_step", "speed/flops_per_clip"]
    lines = [
        json.dumps({"step": 10 * i, **{name: 0.123456789 * i for name in names}}) + "\n"
        for i in range(1, LINES + 1)
    ]
    for number in range(count):
        folder = root / f"run{number:05d}"
        folder.mkdir()
        config = dataclasses.asdict(ExperimentConfig(seed=number))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text("".join(lines))
    return [*root.iterdir()]


def status(count: int) -> Prepared:
    """Find the state of every run, and again after each has logged one more line."""
    from vlmae.launching.status import find_statuses

    folder = tempfile.TemporaryDirectory()
    runs = make_runs(count, Path(folder.name))
    files: dict = {}

    def run() -> dict[str, Any]:
        with folder:
            start = time.process_time()
            find_statuses(Path(folder.name), 0.0, files)
            first = time.process_time()
            for path in runs:
                with (path / "metrics.jsonl").open("a") as file:
                    file.write(f'{{"step": {10 * LINES + 10}, "loss/total": 1.0}}\n')
            written = time.process_time()
            find_statuses(Path(folder.name), 0.0, files)
        spent = {"first": first - start, "refresh": time.process_time() - written}
        return {"seconds": spent}

    return run


def _drop(_: object) -> None:
    """Return nothing of a result, which would be sent to this process."""


CASES: dict[str, tuple[str, Callable[[int], Prepared], tuple[int, ...]]] = {
    "ranks": ("ranks alone, n x n", ranks, (5_000, 10_000, 20_000)),
    "retrieval": ("retrieval, n x n, 128 again", retrieval, (5_000, 10_000, 20_000)),
    "labels": ("intervals of 3,142 labels, n clips", label_interval, (1_000, 3_000, 10_000)),
    "questions": ("drawn questions, n captions", questions, (5_000, 10_000, 20_000)),
    "search": ("index of n clips in 50 steps", search_index, (10_000, 100_000, 1_000_000)),
    "status": ("status of n runs of 300 lines", status, (100, 300, 1_000)),
}


def measure(case: str, count: int) -> dict[str, Any]:
    """Measure a case of one size in this process."""
    run, results = CASES[case][1](count), {}
    before, start = resident_bytes(), time.process_time()

    def once() -> None:
        results.update(run() or {})

    peak = peak_resident_bytes(once)
    spent = {"all": time.process_time() - start}
    return {"n": count, "seconds": spent, "peak_mib": (peak - before) / 2**20} | results


def exponent(points: list[tuple[float, float]]) -> float:
    """Compute the slope between the last two points, both in logarithms; NaN for one."""
    if len(points) < 2:
        return math.nan
    (n1, y1), (n2, y2) = points[-2:]
    return math.log(max(y2, 1e-9) / max(y1, 1e-9)) / math.log(n2 / n1)


def import_seconds() -> dict[str, float]:
    """Measure the CPU seconds of commands that need no model."""
    found = {}
    for name in ("--help", "status --help", "report --help"):
        start = _children()
        command = [sys.executable, "-m", "vlmae", *name.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found[name] = _children() - start
    return found


def _children() -> float:
    import resource

    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def format_rows(found: dict[str, list[dict[str, Any]]]) -> str:
    """Format a table: a row for each timed part of each case."""
    rows = [["", "n", "CPU seconds", "exponent", "peak MiB"]]
    for case, points in found.items():
        for part in points[-1]["seconds"]:
            title = CASES[case][0] + ("" if part == "all" else f": {part}")
            slope = exponent([(x["n"], x["seconds"][part]) for x in points])
            rows.append(
                [
                    title,
                    " / ".join(f"{x['n']:,}" for x in points),
                    " / ".join(f"{x['seconds'][part]:.2g}" for x in points),
                    "" if math.isnan(slope) else f"{slope:.1f}",
                    " / ".join(f"{x['peak_mib']:.0f}" for x in points),
                ]
            )
    return markdown_table(rows)


def main(
    case: tuple[Literal["ranks", "retrieval", "labels", "questions", "search", "status"], ...] = (),
    sizes: tuple[int, ...] = (),
    out_dir: Annotated[Path | None, tyro.conf.arg(name="out-dir")] = None,
) -> None:
    """Measure and print.

    Args:
      case: cases; default all, and the commands' imports.
      sizes: in place of each case's own.
      out_dir: where to write `scale.json` and `scale.md`.
    """
    found = {
        name: [in_own_process(measure, name, n) for n in sizes or CASES[name][2]]
        for name in case or CASES
    }
    imports = {} if case else import_seconds()
    table = format_rows(found)
    settings = {"labels": LABELS, "dim": DIM, "top_k": TOP_K, "lines": LINES, "steps": STEPS}
    print_report(table, settings)
    for name, seconds in imports.items():
        print(f"vlmae {name}: {seconds:.2f} CPU seconds")
    if out_dir:
        write_report(out_dir, "scale", table, settings, cases=found, imports=imports)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
