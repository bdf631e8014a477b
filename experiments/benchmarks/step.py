"""Time and memory of a training step, against the same model in PyTorch.

    python -m experiments.benchmarks.step
    python -m experiments.benchmarks.step --sizes S --frames 4 --rounds 5

Both sides first compute the loss from the same weights and random choices; a difference stops the
benchmark. Then each side runs in a process of its own. A round times one step of either side, and a
ratio compares the two steps of a round. Where memory does not hold both sides, one follows the
other. `--compile-peer` also tries the peer compiled by `torch.compile` and takes the faster form.
Both compute in bfloat16 on a GPU, else in float32.
"""

import itertools
import os
import statistics
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from data_pipelines.schema.checks import UserError
from experiments.benchmarks.cost import Size
from experiments.benchmarks.own_process import OwnProcess, in_own_process
from experiments.benchmarks.report import compare, format_ratio, print_report, write_report
from experiments.benchmarks.sides import (
    DTYPE,
    ON_GPU,
    VARIANTS,
    Form,
    OurSide,
    PeerSide,
    losses_of,
    variant_config,
)
from vlmae.config.experiment import ExperimentConfig
from vlmae.runs.tables import markdown_table

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss, relative
# In a step; but there are at least two clips, which VTM compares. A GPU is busy with hundreds.
MOST_FRAMES, CLIPS = (512, 64) if ON_GPU else (32, 4)
TRIAL_STEPS = 2  # of the peer, to choose its form
OURS_AT_MOST = 2  # times the peer's memory, as measured on CPUs (0.9 to 1.8)


def check_losses(ours: float, theirs: float) -> None:
    """Check that both sides compute the same loss, or raise UserError."""
    if not abs(ours - theirs) <= TOLERANCE[DTYPE] * abs(theirs):
        raise UserError(f"the loss is {ours}, but the peer's {theirs}: not the same model")


def measure(
    config: ExperimentConfig, rounds: int, forms: tuple[Form, ...] = ("eager",)
) -> dict[str, Any]:
    """Check that both sides compute the same loss, then measure seconds and memory of the step.

    Args:
      config: of the step.
      rounds: measured, after a step of each side that warms up.
      forms: of the peer; the fastest one counts.
    """
    ours, theirs = in_own_process(losses_of, config)
    check_losses(ours, theirs)
    form = forms[0] if len(forms) == 1 else fastest_form(config, forms)
    secs: dict[str, list[float]] = {"ours": [], "peer": []}
    peaks: dict[str, int] = {}
    with OwnProcess(PeerSide, config, form) as peer:
        peer.call("step")
        peaks["peer"] = peer.call("peak_bytes")
        together = ON_GPU or OURS_AT_MOST * peaks["peer"] < free_bytes()
        if not together:
            secs["peer"] = [peer.call("seconds") for _ in range(rounds)]
            peer.close()
        with OwnProcess(OurSide, config) as own:
            own.call("step")
            peaks["ours"] = own.call("peak_bytes")
            for _ in range(rounds):
                secs["ours"].append(own.call("seconds"))
                if together:
                    secs["peer"].append(peer.call("seconds"))
    return {
        "peer": form,
        "side_by_side": together,
        "loss": {"ours": ours, "peer": theirs},
        "secs": secs,
        "gib": {side: peak / 2**30 for side, peak in peaks.items()},
    }


def fastest_form(config: ExperimentConfig, forms: tuple[Form, ...]) -> Form:
    """Return the form of the peer that takes least time; each is tried alone."""
    secs: dict[Form, float] = {}
    for form in forms:
        with OwnProcess(PeerSide, config, form) as peer:
            peer.call("step")
            secs[form] = min(peer.call("seconds") for _ in range(TRIAL_STEPS))
    return min(secs, key=secs.__getitem__)


def free_bytes() -> int:
    """Unused memory of the machine (Linux)."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def row(name: str, size: Size, frames: int, batch_size: int, measured: dict[str, Any]) -> dict:
    """Collect the figures of one line; a ratio divides the peer's seconds by ours of the round."""
    secs = measured["secs"]
    return measured | {
        "size": size,
        "variant": name,
        "frames": frames,
        "batch_size": batch_size,
        "clips_per_sec": batch_size / statistics.median(secs["ours"]),
        "peer_clips_per_sec": batch_size / statistics.median(secs["peer"]),
        **compare(secs["peer"], secs["ours"]),
    }


def format_table(rows: list[dict]) -> str:
    """Format a table; "x": how many times faster ours is."""
    head = ["ViT", "frames", "step", "s a step, ours", "clips a second", "PyTorch", "x (range)"]
    cells = [
        [
            f"{r['size']}/16",
            str(r["frames"]),
            r["variant"],
            f"{statistics.median(r['secs']['ours']):.2f}",
            f"{r['clips_per_sec']:.2f}",
            f"{r['peer_clips_per_sec']:.2f} ({r['peer']})",
            format_ratio(r),
            *(f"{r['gib'][side]:.2f}" for side in ("ours", "peer")),
        ]
        for r in rows
    ]
    return markdown_table([[*head, "GiB, ours", "PyTorch"], *cells])


def main(
    sizes: tuple[Size, ...] = ("S", "B"),
    frames: tuple[int, ...] = (1, 4, 16),
    variants: tuple[str, ...] = tuple(VARIANTS),
    batch_size: int = CLIPS,
    rounds: int = 3,
    compile_peer: bool = ON_GPU,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table, and write step.md and step.json after each line.

    A line whose process is killed, as for lack of memory, is left out and named at the end.

    Args:
      sizes: S and B, or one of them.
      frames: of each clip.
      variants: names of the lines.
      batch_size: clips in a step; fewer where that were more than 32 frames (512 on a GPU), but at
        least 2.
      rounds: measured rounds.
      compile_peer: try the peer with torch.compile too, which takes minutes a line.
      out_dir: where the table goes.
    """
    settings = {"batch_size": batch_size, "most_frames": MOST_FRAMES, "rounds": rounds}
    settings |= {"dtype": DTYPE, "torch_threads": torch.get_num_threads()}
    forms: tuple[Form, ...] = ("eager", "compiled") if compile_peer else ("eager",)
    rows: list[dict] = []
    left_out: list[str] = []
    for size, count, name in itertools.product(sizes, frames, variants):
        clips = max(2, min(batch_size, MOST_FRAMES // count))
        try:
            measured = measure(variant_config(size, count, name, clips), rounds, forms)
        except BrokenProcessPool:
            left_out.append(f"{size}/16, {count} frames, {name}")
            print(f"left out: {left_out[-1]}: killed, perhaps for want of memory", flush=True)
        else:
            rows.append(row(name, size, count, clips, measured))
            print(format_table(rows[-1:]).splitlines()[-1], flush=True)
        write_report(out_dir, "step", format_table(rows), settings, rows=rows, left_out=left_out)
    print_report(format_table(rows), settings)
    if left_out:
        print(f"left out, {len(left_out)} of {len(left_out) + len(rows)}: {'; '.join(left_out)}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
