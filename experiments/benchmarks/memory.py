"""Memory of a training step, by what it keeps for the backward pass, and of PyTorch's.

    python -m experiments.benchmarks.memory
    python -m experiments.benchmarks.memory --size B --frames 16 --variant dense

Each figure is the peak of parameters, optimizer state and activations during the steps that follow
the first one, measured in a process of its own (`sides.Side.peak_bytes`).
"""

from pathlib import Path
from typing import Any

from experiments.benchmarks.cost import Size
from experiments.benchmarks.own_process import OwnProcess
from experiments.benchmarks.report import print_report, write_report
from experiments.benchmarks.sides import OurSide, PeerSide, variant_config
from vlmae.config.tree import override
from vlmae.runs.tables import markdown_table

SETTINGS: dict[str, dict[str, Any]] = {
    "all is kept": {},
    "`--model.remat selective`": {"model.remat": "selective"},
    "`--model.remat full`": {"model.remat": "full"},
    "`full`, `--model.video.frames-per-chunk 1`": {
        "model.remat": "full",
        "model.video.frames_per_chunk": 1,
    },
    "`--optim.accumulate-steps 2`": {"optim.accumulate_steps": 2},
}


def measure(side: OwnProcess) -> float:
    """Return the peak memory of a step after one warm-up step, in GiB, and end the process."""
    with side:
        side.call("step")
        return side.call("peak_bytes") / 2**30


def format_table(gib: dict[str, float]) -> str:
    """Format a table whose ratios compare with the first row."""
    first = next(iter(gib.values()))
    rows = [(name, f"{size:.2f}", f"{size / first:.2f}") for name, size in gib.items()]
    return markdown_table([["step", "GiB", "x"], *rows])


def main(
    size: Size = "S",
    frames: int = 4,
    variant: str = "SMAUG",
    batch_size: int = 4,
    peer: bool = True,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table and write memory.md and memory.json.

    Args:
      size: S or B.
      frames: of each clip.
      variant: dense; SMAUG, masked 0.65; SMAUG; or MuLTI.
      batch_size: clips in a step.
      peer: measure PyTorch too, as it is and compiled.
      out_dir: where the table goes.
    """
    config = variant_config(size, frames, variant, batch_size)
    sides: dict[str, tuple] = {
        name: (OurSide, override(config, changes)) for name, changes in SETTINGS.items()
    }
    if peer:
        sides |= {"PyTorch": (PeerSide, config, "eager")}
        sides |= {"PyTorch, compiled": (PeerSide, config, "compiled")}
    gib = {}
    for name, made in sides.items():
        gib[name] = measure(OwnProcess(*made))
        print(f"{name}: {gib[name]:.2f} GiB", flush=True)
    settings = {"size": size, "frames": frames, "variant": variant, "batch_size": batch_size}
    write_report(out_dir, "memory", format_table(gib), settings, gib=gib)
    print_report(format_table(gib), settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
