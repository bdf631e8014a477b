"""Bytes that a training step sends over the network, for growing numbers of simulated devices.

    python -m experiments.benchmarks.network
    python -m experiments.benchmarks.network --devices 2 4 --frames 4

ViT-B/16 and BERT-base, 32 clips a device, VTC over the global batch and VTM with negatives of the
device's own rows (the defaults), sharded over `data` (parameters replicated) or `fsdp` (parameters
sharded). Nothing runs: the bytes are those of the results of the compiled step's collectives, on
each device. The step is compiled for CPUs; compilers for GPUs may choose other collectives.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

# Before jax starts: its simulated devices wait for each other forever without more threads.
os.environ.setdefault("NPROC", "16")

import jax

from experiments.benchmarks.cost import Size, base_config, compile_step
from experiments.benchmarks.report import print_report, write_report
from vlmae.config.experiment import MeshConfig
from vlmae.config.tree import override
from vlmae.parallel.sharding import make_mesh
from vlmae.runs.tables import markdown_table
from vlmae.training.step import abstract_batch
from vlmae.training.step_cost import KINDS, collective_bytes

Axis = Literal["data", "fsdp"]


def measure(size: Size, axis: Axis, devices: int, frames: int, rows: int) -> dict:
    """Bytes by kind of one compiled step, and the seconds of compiling it."""
    base = base_config(size, rows * devices, "float32")
    config = override(base, {"data.train.0.num_frames": frames, "model.video.mask.ratio": 0.65})
    mesh = make_mesh(MeshConfig(**{"data": 1, axis: devices}), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = compile_step(config, mesh, abstract_batch(config))
    return {
        "axis": axis,
        "devices": devices,
        "bytes": collective_bytes(program.run.as_text()),
        "similarities_bytes": (rows * devices) ** 2 * 4,
        "compile_secs": program.compile_secs,
    }


def format_rows(rows: Sequence[dict]) -> str:
    """Format a table in MB a step on each device."""
    kinds = [kind for kind in KINDS if any(kind in row["bytes"] for row in rows)]
    lines = []
    for row in rows:
        sizes = [row["bytes"].get(kind, 0) for kind in kinds]
        cells = [f"{size / 1e6:,.2f}" for size in (*sizes, sum(sizes), row["similarities_bytes"])]
        lines.append([row["axis"], str(row["devices"]), *cells])
    return markdown_table([["cut by", "devices", *kinds, "all", "similarity matrix"], *lines])


def main(
    devices: tuple[int, ...] = (2, 4, 8, 16, 64),
    axes: tuple[Axis, ...] = ("data", "fsdp"),
    size: Size = "B",
    frames: int = 1,
    rows: int = 32,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table and write network.json and network.md.

    Args:
      devices: how many, simulated on the CPU.
      axes: of the mesh, one after the other.
      size: of the model.
      frames: of each clip.
      rows: clips on each device.
      out_dir: where the tables go.
    """
    jax.config.update("jax_num_cpu_devices", max(devices))
    results = []
    for axis in axes:
        for count in devices:
            results.append(measure(size, axis, count, frames, rows))
            print(results[-1], flush=True)
    table = format_rows(results)
    settings = {"size": size, "frames": frames, "rows": rows}
    write_report(out_dir, "network", table, settings, steps=results)
    print_report(table, settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
