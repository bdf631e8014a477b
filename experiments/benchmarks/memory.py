"""What a training step needs in memory: by what it keeps for the backward pass, and PyTorch's.

    python -m experiments.benchmarks.memory
    python -m experiments.benchmarks.memory --size B --frames 16 --variant dense

Parameters, optimizer and activations, at most, during steps that follow a first one; every figure
is of a process of its own (`sides.Side.peak_bytes`).
"""

from pathlib import Path
from typing import Any

from experiments.benchmarks.cost import Size
from experiments.benchmarks.own_process import OwnProcess
from experiments.benchmarks.report import write_report
from experiments.benchmarks.sides import OurSide, PeerSide, variant_config
from vlmae.config_tree import override
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
}


def measure(side: OwnProcess) -> dict[str, float]:
    """Peak bytes and seconds of a side's steps, after one that warms up; ends its process."""
    with side:
        side.call("step")
        secs = min(side.call("seconds") for _ in range(STEPS))
        return {"bytes": side.call("peak_bytes"), "secs": secs}


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
    config = variant_config(size, frames, variant, batch_size)
    sides: dict[str, tuple] = {
        name: (OurSide, override(config, changes)) for name, changes in SETTINGS.items()
    }
    if peer:
        sides |= {"PyTorch": (PeerSide, config, "eager")}
        sides |= {"PyTorch, compiled": (PeerSide, config, "compiled")}
    rows = {}
    for name, made in sides.items():
        rows[name] = measure(OwnProcess(*made))
        print(name, rows[name], flush=True)
    settings = {"size": size, "frames": frames, "variant": variant, "batch_size": batch_size}
    write_report(out_dir, "memory", format_table(rows), settings=settings, rows=rows)
    print(f"{settings} on {', '.join(environment()['devices'])}\n{format_table(rows)}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
