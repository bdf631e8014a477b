"""A training step of ours against the same model in PyTorch: time, clips a second, memory.

    python -m experiments.benchmarks.step
    python -m experiments.benchmarks.step --sizes S --frames 4 --rounds 5

First both compute the same loss from the same weights and the same random choices; a difference
stops the benchmark. Then steps are timed in rounds, each of which runs one step of either side; a
ratio compares two steps of the same round. The peer runs as it is and compiled by `torch.compile`,
and the faster of the two counts. Memory is measured as `experiments.benchmarks.memory` does it. On
a GPU both compute in bfloat16, else in float32.
"""

import functools
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import torch
from jaxtyping import Array, PyTree

from data_pipelines.records import Batch
from experiments.benchmarks.cost import Program, Size, compile_step, noise_on, one_device
from experiments.benchmarks.memory import measure_ours, measure_peer
from experiments.benchmarks.own_process import cache_in, in_own_process
from experiments.benchmarks.report import compare, write_report
from experiments.benchmarks.sides import (
    DTYPE,
    VARIANTS,
    draw,
    half_precision,
    make_peer,
    our_step,
    peer_batch,
    peer_step,
    seconds,
    to_torch_batch,
    variant_config,
)
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override
from vlmae.models.video_language import build_model
from vlmae.objectives import compute_losses
from vlmae.train import make_init
from vlmae.workdir import environment

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss, relative


def losses_of(config: ExperimentConfig, params: PyTree, batch: Batch) -> tuple[float, float]:
    """The loss of a step of ours and of the peer's, from the same parameters and choices.

    Without the noise that only training has: frames are chosen by their scores alone, and every
    patch is painted.
    """
    keep_rate = config.model.video.sparsify.keep_rate
    calm = override(config, {"model.video.sparsify.eval_keep_rate": keep_rate})
    calm = override(calm, {"model.pixel_decoder.target_ratio": 0.0})
    model, key = build_model(calm), jax.random.key(0)

    @jax.jit
    def run(params: PyTree, batch: Batch) -> tuple[Array, dict]:
        variables, config = {"params": params}, calm.objectives
        loss = model.apply(variables, batch, key, config, method=compute_losses).value
        return loss, model.apply(variables, batch, key, config, method=draw)

    ours, drawn = run(params, batch)
    peer = make_peer(calm, params)
    with torch.no_grad(), half_precision():
        theirs = peer(to_torch_batch(batch, drawn))
    return float(ours), float(theirs)


def check_losses(ours: float, theirs: float) -> None:
    """Raises ValueError if the two sides do not compute the same."""
    if not abs(ours - theirs) <= TOLERANCE[DTYPE] * abs(theirs):
        raise ValueError(f"the loss is {ours}, but the peer's {theirs}: not the same model")


def measure(config: ExperimentConfig, rounds: int, compile_peer: bool) -> dict[str, Any]:
    """Seconds of every step, after a check that both sides compute the same."""
    mesh = one_device()
    batch = noise_on(mesh, config)
    params = jax.jit(make_init(config))(0).params
    ours, theirs = losses_of(config, params, batch)
    check_losses(ours, theirs)

    program: Program = compile_step(config, mesh, batch)
    torch_batch = peer_batch(config, params, batch)
    peers = {"eager": peer_step(make_peer(config, params), config, compiled=False)}
    if compile_peer:
        peers["compiled"] = peer_step(make_peer(config, params), config, compiled=True)
    del params
    runs = {"ours": functools.partial(our_step(program), batch)}
    runs |= {name: functools.partial(step, torch_batch) for name, step in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + rounds):  # the first round warms up, and compiles the peer
        for name, run in runs.items():
            secs = seconds(run)
            times[name] += [secs] * (number > 0)
    return {
        "peer": faster(times),
        "loss": {"ours": ours, "peer": theirs},
        "secs": times,
        "gflops_per_clip": program.flops / len(batch.valid) / 1e9,
        "compile_secs": program.compile_secs,
    }


def faster(secs: dict[str, list[float]]) -> str:
    """The form of the peer that took less time."""
    return min(secs.keys() - {"ours"}, key=lambda name: statistics.median(secs[name]))


def peaks(given: tuple[Size, int, str, int], peer: str, env: dict[str, str]) -> dict[str, float]:
    """GiB of our step and of the peer's, in the form that was faster (see `memory`)."""
    measured = {
        "ours": in_own_process(measure_ours, *given, {}, env=env),
        "peer": in_own_process(measure_peer, *given, peer == "compiled", env=env),
    }
    return {side: x["bytes"] / 2**30 for side, x in measured.items()}


def row(name: str, size: Size, frames: int, batch_size: int, measured: dict[str, Any]) -> dict:
    """The figures of one line; a ratio is the peer's seconds by ours in the same round."""
    secs, best = measured["secs"], measured["peer"]
    return measured | {
        "size": size,
        "variant": name,
        "frames": frames,
        "batch_size": batch_size,
        "clips_per_sec": batch_size / statistics.median(secs["ours"]),
        "peer_clips_per_sec": batch_size / statistics.median(secs[best]),
        **compare(secs[best], secs["ours"]),
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
    compile_peer: bool = True,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Prints the table and writes step.md and step.json, anew after each line.

    Args:
      sizes: S and B, or one of them.
      frames: of each clip.
      variants: names of the lines.
      batch_size: clips in a step.
      rounds: measured rounds, after one that warms up.
      compile_peer: try the peer with torch.compile too.
      out_dir: where the table goes.
    """
    settings = {"batch_size": batch_size, "rounds": rounds, "dtype": DTYPE}
    versions = {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    rows: list[dict] = []
    for size, count, name in itertools.product(sizes, frames, variants):
        with tempfile.TemporaryDirectory() as folder:
            jax.config.update("jax_compilation_cache_dir", folder)
            given = (size, count, name, batch_size)
            measured = measure(variant_config(*given), rounds, compile_peer)
            jax.clear_caches()
            measured["gib"] = peaks(given, measured["peer"], cache_in(folder))
        rows.append(row(name, size, count, batch_size, measured))
        print(format_table(rows[-1:]).splitlines()[-1], flush=True)
        content = {"settings": settings, "environment": environment() | versions, "rows": rows}
        write_report(out_dir, "step", format_table(rows), **content)
    print(f"{settings} on {', '.join(environment()['devices'])}\n{format_table(rows)}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
