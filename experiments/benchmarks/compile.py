"""Compile time of a training step: with an empty cache, and from JAX's persistent cache.

    python -m experiments.benchmarks.compile
    python -m experiments.benchmarks.compile --sizes B --variants SMAUG

Each figure comes from a process of its own: one with an empty cache, then one with the cache that
it left, several times. Runs keep such a cache (`vlmae.parallel.compile_cache`). Tracing is the time
in which Python walks through the model; no cache spares it.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.cost import FULL, MASKED, Size, base_config, one_device
from experiments.benchmarks.own_process import cache_in, in_own_process
from experiments.benchmarks.report import print_report, write_report
from vlmae.config.tree import override
from vlmae.parallel.malloc import keep_freed_memory
from vlmae.runs.tables import markdown_table
from vlmae.training.step import abstract_batch, make_init, make_step, run_values

VARIANTS: dict[str, dict[str, Any]] = {"dense": {}, "masked": MASKED, "SMAUG": FULL}


def measure(size: Size, variant: str, frames: int, batch_size: int) -> dict[str, float]:
    """Measure seconds to make the first state, to trace the step, to compile it, and both."""
    keep_freed_memory()  # as training does
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    base = base_config(size, batch_size, dtype)
    config = override(base, VARIANTS[variant] | {"data.train.0.num_frames": frames})
    mesh = one_device()
    times = [time.perf_counter()]
    init = jax.jit(make_init(config))
    init.lower(0).compile()
    times.append(time.perf_counter())
    state = jax.eval_shape(init, 0)
    lowered = make_step(config, mesh, state).lower(
        state, abstract_batch(config), run_values(config)
    )
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    names = ("state", "trace", "compile")
    secs = {name: times[i + 1] - times[i] for i, name in enumerate(names)}
    return secs | {"step": secs["trace"] + secs["compile"]}


def format_table(rows: list[dict]) -> str:
    """Format medians and ranges in seconds."""
    head = ["ViT", "step", "cache", "first state", "tracing the step", "compiling it", "step, both"]
    lines = []
    for r in rows:
        for cache in ("cold", "cached"):
            parts = [[secs[name] for secs in r[cache]] for name in r[cache][0]]
            cells = [f"{statistics.median(x):.1f} ({min(x):.1f}-{max(x):.1f})" for x in parts]
            lines.append([f"{r['size']}/16", r["variant"], cache, *cells])
    return markdown_table([head, *lines])


def main(
    sizes: tuple[Size, ...] = ("S", "B"),
    variants: tuple[str, ...] = tuple(VARIANTS),
    frames: int = 4,
    batch_size: int = 4,
    repeats: int = 3,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table and write compile.md and compile.json.

    Args:
      sizes: S and B, or one of them.
      variants: what is compiled.
      frames: of each clip.
      batch_size: clips in a step.
      repeats: of each, from an empty cache.
      out_dir: where the table goes.
    """
    rows = []
    for size in sizes:
        for variant in variants:
            row = {"size": size, "variant": variant, "cold": [], "cached": []}
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as folder:
                    for cache in ("cold", "cached"):
                        arguments = (size, variant, frames, batch_size)
                        row[cache].append(in_own_process(measure, *arguments, env=cache_in(folder)))
            rows.append(row)
            print(format_table([row]), flush=True)
    settings = {"frames": frames, "batch_size": batch_size, "repeats": repeats}
    write_report(out_dir, "compile", format_table(rows), settings, rows=rows)
    print_report(format_table(rows), settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
