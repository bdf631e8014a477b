"""A training step of ours against the same model in PyTorch: time, clips a second, ratios.

    python -m experiments.benchmarks.step
    python -m experiments.benchmarks.step --sizes S --frames 4 --rounds 5

First both compute the same loss from the same weights and the same random choices; a difference
stops the benchmark. Then steps are timed in rounds, each of which runs one step of either side; a
ratio compares two steps of the same round. The peer runs as it is and compiled by `torch.compile`,
and the faster of the two counts. On a GPU both compute in bfloat16, else in float32.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Key, PyTree

from data_pipelines.records import Batch
from experiments.benchmarks.cost import (
    FULL,
    MASKED,
    VOCAB_SIZE,
    Program,
    Size,
    base_config,
    compile_step,
    time_step,
)
from experiments.benchmarks.peer import Peer, TorchBatch
from vlmae import choices
from vlmae.config import ExperimentConfig, MeshConfig, ObjectivesConfig
from vlmae.config_tree import override
from vlmae.example_batch import abstract_batch, random_batch
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.objectives import compute_losses, draw_options, extract, hard_negatives, keys_of
from vlmae.sharding import make_mesh, put_batch
from vlmae.train import make_init
from vlmae.workdir import environment

ON_GPU = jax.default_backend() == "gpu"
DTYPE = "bfloat16" if ON_GPU else "float32"
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss, relative
# [CLS] what does it show [SEP] (a) {} (b) {} (c) {} (d) {} [SEP], in ids that mean nothing here
QUESTION = (101, 1996, 102, 1997, -1, 1998, -1, 1999, -1, 2000, -1, 102)
MULTI = {
    "model.video.mask.scheme": "none",
    "model.video.mask.ratio": 0.0,
    "model.fusion.kind": "multiway",
    "objectives.mvm": 0.0,
    "objectives.mcm": 1.0,
    "objectives.mcm_template_ids": QUESTION,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "SMAUG, masked 0.65": MASKED,
    "SMAUG": FULL,
    "MuLTI": MULTI,
}


def draw(
    model: VideoLanguageModel, batch: Batch, key: Key[Array, ""], config: ObjectivesConfig
) -> dict[str, Any]:
    """All that `compute_losses` draws with this key, by the names of `TorchBatch`."""
    keys = keys_of(key)
    features = extract(model, batch, keys["mask"], keys["mlm"], config)
    text, video = hard_negatives(model, features, batch, keys["vtm"], config)
    drawn = {
        "kept_ids": features.video.stage_places[0],
        "paint_noise": jax.random.uniform(keys["mvm"], features.video.removed_mask.shape),
        "hidden_ids": features.words.ids,
        "hidden": features.words.targets_mask,
        "other_text": text.index,
        "other_video": video.index,
        "question": None,
        "answer": jnp.zeros_like(text.index),
    }
    if config.mcm:
        options, answer, _ = draw_options(batch, keys["mcm"], config)
        question = choices.compose(config.mcm_template_ids, options, config.mcm_len)
        drawn |= {"question": tuple(question), "answer": answer}
    return drawn


def to_torch_batch(batch: Batch, drawn: dict[str, Any]) -> TorchBatch:
    """A batch and its draws on PyTorch's device."""
    given = {name: getattr(batch, name) for name in ("video", "text_ids", "text_mask")}

    def tensor(x: Array) -> torch.Tensor:
        x = torch.tensor(np.asarray(x), device="cuda" if ON_GPU else "cpu")
        return x.long() if x.dtype == torch.int32 else x

    return TorchBatch(**jax.tree.map(tensor, given | drawn))


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


def make_peer(config: ExperimentConfig, params: PyTree) -> Peer:
    """The peer on its device."""
    return Peer(config, jax.device_get(params)).to("cuda" if ON_GPU else "cpu")


def half_precision() -> torch.autocast:
    """bfloat16 for what is computed in here on a GPU, float32 elsewhere."""
    return torch.autocast("cuda" if ON_GPU else "cpu", torch.bfloat16, enabled=ON_GPU)


def peer_step(peer: Peer, config: ExperimentConfig, compiled: bool) -> Callable[[TorchBatch], None]:
    """Forward, backward and AdamW, as they are or compiled."""
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [x for x in peer.parameters() if x.requires_grad],
        lr=optim.learning_rate,
        betas=(optim.b1, optim.b2),
        weight_decay=optim.weight_decay,
        fused=True,
    )
    loss_of = torch.compile(peer) if compiled else peer

    def step(batch: TorchBatch) -> None:
        with half_precision():
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ON_GPU:
            torch.cuda.synchronize()

    return step


def seconds(run: Callable[[], None]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(config: ExperimentConfig, rounds: int, compile_peer: bool) -> dict[str, Any]:
    """Seconds of every step, after a check that both sides compute the same."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    batch = put_batch(random_batch(abstract_batch(config), VOCAB_SIZE), mesh)
    params = jax.jit(make_init(config))(0).params
    ours, theirs = losses_of(config, params, batch)
    check_losses(ours, theirs)

    program: Program = compile_step(config, mesh, batch)
    drawn = build_model(config).apply(
        {"params": params}, batch, jax.random.key(0), config.objectives, method=draw
    )
    torch_batch = to_torch_batch(batch, drawn)
    peers = {"eager": peer_step(make_peer(config, params), config, compiled=False)}
    if compile_peer:
        peers["compiled"] = peer_step(make_peer(config, params), config, compiled=True)
    del params, drawn
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in peers}}
    for number in range(1 + rounds):  # the first round warms up, and compiles the peer
        secs = {"ours": time_step(program, batch)}
        for name, step in peers.items():
            secs[name] = seconds(lambda step=step: step(torch_batch))
        for name, value in secs.items():
            times[name] += [value] * (number > 0)
    return {
        "loss": {"ours": ours, "peer": theirs},
        "secs": times,
        "gflops_per_clip": program.flops / len(batch.valid) / 1e9,
        "compile_secs": program.compile_secs,
    }


def row(name: str, size: Size, frames: int, batch_size: int, measured: dict[str, Any]) -> dict:
    """The figures of one line; a ratio is the peer's seconds by ours in the same round."""
    secs = measured["secs"]
    best = min((peer for peer in secs if peer != "ours"), key=lambda x: statistics.median(secs[x]))
    ratios = [theirs / ours for theirs, ours in zip(secs[best], secs["ours"], strict=True)]
    return measured | {
        "size": size,
        "variant": name,
        "frames": frames,
        "batch_size": batch_size,
        "peer": best,
        "clips_per_sec": batch_size / statistics.median(secs["ours"]),
        "peer_clips_per_sec": batch_size / statistics.median(secs[best]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def format_table(rows: list[dict]) -> str:
    """Markdown; "x" says how many times faster ours is."""
    lines = [
        "| ViT | frames | step | clips a second, ours | PyTorch | x (range) |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["ratio_range"]
        cells = [
            f"{r['size']}/16",
            str(r["frames"]),
            r["variant"],
            f"{r['clips_per_sec']:.2f}",
            f"{r['peer_clips_per_sec']:.2f} ({r['peer']})",
            f"{r['ratio']:.2f} ({low:.2f}-{high:.2f})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def variant_config(size: Size, frames: int, name: str, batch_size: int) -> ExperimentConfig:
    """The config of one line: 224 px, 32 words, no dropout."""
    changes = {
        "data.train.0.num_frames": frames,
        "model.text.dropout": 0.0,
        "model.attention": "cudnn" if ON_GPU else "xla",
    }
    return override(base_config(size, batch_size, DTYPE), changes | VARIANTS[name])


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
    out_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for size in sizes:
        for count in frames:
            for name in variants:
                config = variant_config(size, count, name, batch_size)
                measured = measure(config, rounds, compile_peer)
                rows.append(row(name, size, count, batch_size, measured))
                print(format_table(rows[-1:]).splitlines()[-1], flush=True)
                report = {"settings": settings, "environment": environment() | versions}
                text = json.dumps(report | {"rows": rows}, indent=2)
                (out_dir / "step.json").write_text(text + "\n")
                (out_dir / "step.md").write_text(format_table(rows) + "\n")
                jax.clear_caches()
    print(f"{settings} on {', '.join(environment()['devices'])}\n{format_table(rows)}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
