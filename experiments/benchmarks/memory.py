"""What a training step needs in memory: by what it keeps for the backward pass, and PyTorch's.

    python -m experiments.benchmarks.memory
    python -m experiments.benchmarks.memory --size B --frames 16 --variant dense

Parameters, optimizer and activations, at most, during steps that follow a first one. Every figure
is of a process of its own: on a GPU what the framework has taken, on a CPU how much larger the
process is than before it made the model.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch

from data_pipelines.records import Batch
from experiments.benchmarks.cost import Size, compile_step, noise_on, one_device
from experiments.benchmarks.own_process import in_own_process, peak_resident_bytes, resident_bytes
from experiments.benchmarks.peer import TorchBatch
from experiments.benchmarks.report import write_report
from experiments.benchmarks.sides import (
    ON_GPU,
    make_peer,
    our_step,
    peer_batch,
    peer_step,
    seconds,
    variant_config,
)
from vlmae.config_tree import override
from vlmae.train import make_init
from vlmae.workdir import environment

STEPS = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "all is kept": {},
    "`--model.remat selective`": {"model.remat": "selective"},
    "`--model.remat full`": {"model.remat": "full"},
    "`full`, `--model.video.frames-per-chunk 1`": {
        "model.remat": "full",
        "model.video.frames_per_chunk": 1,
    },
    "`--optim.accumulate-steps 2`": {"optim.accumulate_steps": 2},
    "`--model.scan-blocks`": {"model.scan_blocks": True},
}


def measure_ours(
    size: Size, frames: int, variant: str, batch_size: int, changes: dict[str, Any]
) -> dict[str, float]:
    """Peak bytes and seconds of our step, in this process."""
    config = override(variant_config(size, frames, variant, batch_size), changes)
    mesh = one_device()
    batch = noise_on(mesh, config)
    before = resident_bytes()
    program = compile_step(config, mesh, batch)
    step = our_step(program)
    step(batch)
    measured = measure_steps(step, batch, before)
    if ON_GPU:
        measured["bytes"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return measured


def measure_peer(
    size: Size, frames: int, variant: str, batch_size: int, compiled: bool
) -> dict[str, float]:
    """Peak bytes and seconds of the peer's step, in this process."""
    config = variant_config(size, frames, variant, batch_size)
    mesh = one_device()
    batch = noise_on(mesh, config)
    params = jax.jit(make_init(config))(0).params
    torch_batch = peer_batch(config, params, batch)
    params = jax.device_get(params)
    jax.clear_caches()
    before = resident_bytes()
    step = peer_step(make_peer(config, params), config, compiled)
    step(torch_batch)
    measured = measure_steps(step, torch_batch, before)
    if ON_GPU:
        measured["bytes"] = torch.cuda.max_memory_allocated()
    return measured


def measure_steps(step: Callable, batch: Batch | TorchBatch, before: int) -> dict[str, float]:
    """Seconds of the fastest of a few steps, and how far the process grows over `before` bytes."""
    secs: list[float] = []

    def run() -> None:
        secs.extend(seconds(functools.partial(step, batch)) for _ in range(STEPS))

    return {"bytes": peak_resident_bytes(run) - before, "secs": min(secs)}


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown; the first row is what the others are compared with."""
    first = next(iter(rows.values()))
    lines = ["| step | GiB | x | s |", "|---|---|---|---|"]
    for name, row in rows.items():
        share = row["bytes"] / first["bytes"]
        lines.append(f"| {name} | {row['bytes'] / 2**30:.2f} | {share:.2f} | {row['secs']:.2f} |")
    return "\n".join(lines)


def main(
    size: Size = "S",
    frames: int = 4,
    variant: str = "SMAUG",
    batch_size: int = 4,
    peer: bool = True,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Prints the table and writes memory.md and memory.json.

    Args:
      size: S or B.
      frames: of each clip.
      variant: dense; SMAUG, masked 0.65; SMAUG; or MuLTI.
      batch_size: clips in a step.
      peer: measure PyTorch too, as it is and compiled.
      out_dir: where the table goes.
    """
    given = (size, frames, variant, batch_size)
    rows = {}
    for name, changes in SETTINGS.items():
        rows[name] = in_own_process(measure_ours, *given, changes)
        print(name, rows[name], flush=True)
    for name, compiled in {"PyTorch": False, "PyTorch, compiled": True}.items() if peer else ():
        rows[name] = in_own_process(measure_peer, *given, compiled)
        print(name, rows[name], flush=True)
    settings = {"size": size, "frames": frames, "variant": variant, "batch_size": batch_size}
    write_report(out_dir, "memory", format_table(rows), settings=settings, rows=rows)
    print(f"{settings} on {', '.join(environment()['devices'])}\n{format_table(rows)}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
