"""A training step of ours against the same model in PyTorch: time, clips a second, memory.

    python -m experiments.benchmarks.step
    python -m experiments.benchmarks.step --sizes S --frames 4 --rounds 5

First both compute the same loss from the same weights and the same random choices; a difference
stops the benchmark. Then each has a process of its own, and steps are timed in rounds, each of
which runs one step of either side; a ratio compares two steps of the same round. Where memory does
not hold both, one follows the other. With `--compile-peer` the peer is also tried compiled by
`torch.compile`, and the faster of the two counts. On a GPU both compute in bfloat16, else in
float32.
"""

import itertools
import os
import statistics
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.cost import Size
from experiments.benchmarks.own_process import OwnProcess, in_own_process
from experiments.benchmarks.report import compare, print_report, write_report
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
from vlmae.config import ExperimentConfig

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss, relative
MOST_FRAMES = 32  # in a step; but there are at least two clips, which VTM compares
TRIAL_STEPS = 2  # of the peer, to choose its form
OURS_AT_MOST = 2  # times the peer's memory, as measured on CPUs (0.9 to 1.8)


def check_losses(ours: float, theirs: float) -> None:
    """Raises ValueError if the two sides do not compute the same."""
    if not abs(ours - theirs) <= TOLERANCE[DTYPE] * abs(theirs):
        raise ValueError(f"the loss is {ours}, but the peer's {theirs}: not the same model")


def measure(
    config: ExperimentConfig, rounds: int, forms: tuple[Form, ...] = ("eager",)
) -> dict[str, Any]:
    """Seconds of every step, and memory, after a check that both sides compute the same.

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
    """The form of the peer that takes least time, each tried alone."""
    secs: dict[Form, float] = {}
    for form in forms:
        with OwnProcess(PeerSide, config, form) as peer:
            peer.call("step")
            secs[form] = min(peer.call("seconds") for _ in range(TRIAL_STEPS))
    return min(secs, key=secs.__getitem__)


def free_bytes() -> int:
    """Memory of the machine that nobody uses (Linux)."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def row(name: str, size: Size, frames: int, batch_size: int, measured: dict[str, Any]) -> dict:
    """The figures of one line; a ratio is the peer's seconds by ours in the same round."""
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
    """Markdown; "x" says how many times faster ours is."""
    lines = [
        "| ViT | frames | step | s a step, ours | clips a second | PyTorch | x (range) "
        "| GiB, ours | PyTorch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["ratio_range"]
        cells = [
            f"{r['size']}/16",
            str(r["frames"]),
            r["variant"],
            f"{statistics.median(r['secs']['ours']):.2f}",
            f"{r['clips_per_sec']:.2f}",
            f"{r['peer_clips_per_sec']:.2f} ({r['peer']})",
            f"{r['ratio']:.2f} ({low:.2f}-{high:.2f})",
            *(f"{r['gib'][side]:.2f}" for side in ("ours", "peer")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    sizes: tuple[Size, ...] = ("S", "B"),
    frames: tuple[int, ...] = (1, 4, 16),
    variants: tuple[str, ...] = tuple(VARIANTS),
    batch_size: int = 4,
    rounds: int = 3,
    compile_peer: bool = ON_GPU,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Prints the table and writes step.md and step.json, anew after each line.

    A line whose process is killed, as for want of memory, is left out, and named at the end.

    Args:
      sizes: S and B, or one of them.
      frames: of each clip.
      variants: names of the lines.
      batch_size: clips in a step; fewer where that were more than 32 frames, but at least 2.
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
