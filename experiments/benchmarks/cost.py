"""Cost of a training step with SMAUG's parts or MuLTI's adapters: FLOPs, memory, time.

    python -m experiments.benchmarks.cost
    python -m experiments.benchmarks.cost --sizes S --compare adapters --rounds 5

Four frames of 224 px and 32 words, random data. Time is measured in rounds, each of which runs two
steps of every variant and times the second; a ratio compares two steps of the same round, and the
median over the rounds is reported. One variant's state is in memory at a time.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.records import Batch
from experiments.benchmarks import report
from vlmae.config.experiment import ExperimentConfig, MeshConfig, ObjectivesConfig, TrainConfig
from vlmae.config.model import (
    MaskConfig,
    ModelConfig,
    PixelDecoderConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)
from vlmae.config.tree import override
from vlmae.parallel.malloc import keep_freed_memory
from vlmae.parallel.sharding import make_mesh, put_batch
from vlmae.runs.tables import markdown_table
from vlmae.training.step import (
    RunValues,
    abstract_batch,
    make_init,
    make_step,
    random_batch,
    run_values,
)

Size = Literal["S", "B"]
WIDTHS = {"S": 384, "B": 768}
VOCAB_SIZE = 30522  # BERT's
# The encoder sees 195 of 196 patches: as good as dense, and MVM still has something to paint.
ONE_PATCH = 1 / 196

MASKED = {"model.video.mask.ratio": 0.65}
SPARSIFIED = MASKED | {"model.video.sparsify.keep_rate": 0.7}
FULL = SPARSIFIED | {"model.selector.kind": "mlp", "model.pixel_decoder.target_ratio": 0.5}
PARTS: dict[str, dict[str, Any]] = {
    "dense, all four objectives": {},
    "dense, without MVM": {"objectives.mvm": 0.0},
    "masked 0.65": MASKED,
    "+ sparsified 0.7 at blocks 3, 6, 9": SPARSIFIED,
    "+ 2 of 4 frames, half of the targets": FULL,
    "+ masked text for all objectives": FULL | {"objectives.mask_text_for": "all"},
}


def _frozen(kind: str) -> dict[str, Any]:
    """Eight of 12 video blocks and six of nine text blocks frozen; neither masked nor MVM."""
    return {
        "objectives.mvm": 0.0,
        "model.video.adapter.frozen_blocks": 8,
        "model.video.adapter.kind": kind,
        "model.text.adapter.frozen_blocks": 6,
        "model.text.adapter.kind": kind,
    }


ADAPTERS: dict[str, dict[str, Any]] = {
    "all finetuned": {"objectives.mvm": 0.0},
    "shallow blocks frozen, side adapters": _frozen("side"),
    "shallow blocks frozen, inline adapters": _frozen("inline"),
    "shallow blocks frozen, no adapters": _frozen("none"),
}
VARIANTS = {"parts": PARTS, "adapters": ADAPTERS}


class Program(NamedTuple):
    """A compiled training step with the figures of the compiler."""

    run: Callable
    values: RunValues  # third input of `run`
    init: Callable
    flops: float  # of a step
    temporary_bytes: int
    compile_secs: float


def base_config(size: Size, batch_size: int, dtype: str) -> ExperimentConfig:
    """Build the dense config: ViT-S/16 with a text encoder as wide, or ViT-B/16 and BERT-base."""
    width = WIDTHS[size]
    layer = {"width": width, "num_heads": width // 64, "mlp_dim": 4 * width}
    return ExperimentConfig(
        data=DataConfig(
            train=(SourceConfig(num_frames=4),), batch_size=batch_size, image_size=224, text_len=32
        ),
        model=ModelConfig(
            video=VideoEncoderConfig(**layer, mask=MaskConfig(ratio=ONE_PATCH)),
            text=TextEncoderConfig(**layer, vocab_size=VOCAB_SIZE),
            pixel_decoder=PixelDecoderConfig(width=width // 2, num_heads=width // 128),
            dtype=dtype,
        ),
        objectives=ObjectivesConfig(),
        train=TrainConfig(steps=1000),
    )


def one_device() -> jax.sharding.Mesh:
    """Return a mesh of the first device alone."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def noise_on(mesh: jax.sharding.Mesh, config: ExperimentConfig) -> Batch:
    """Return a batch of noise for the step of a config, on the devices of the mesh."""
    return put_batch(random_batch(abstract_batch(config), VOCAB_SIZE), mesh)


def compile_step(config: ExperimentConfig, mesh: jax.sharding.Mesh, batch: Batch) -> Program:
    """Compile the training step of a config for a batch of arrays or of shapes."""
    init = jax.jit(make_init(config))
    state = jax.eval_shape(init, 0)
    start = time.perf_counter()
    values = run_values(config)
    program = make_step(config, mesh, state).lower(state, batch, values).compile()
    return Program(
        run=program,
        values=values,
        init=init,
        flops=program.cost_analysis()["flops"],
        temporary_bytes=program.memory_analysis().temp_size_in_bytes,
        compile_secs=time.perf_counter() - start,
    )


def time_step(program: Program, batch: Batch) -> float:
    """Measure the second step from a fresh state, in seconds; the first one allocates memory."""
    state = jax.block_until_ready(program.run(program.init(0), batch, program.values)[0])
    start = time.perf_counter()
    jax.block_until_ready(program.run(state, batch, program.values))
    return time.perf_counter() - start


def measure(
    size: Size, variants: dict[str, dict[str, Any]], batch_size: int, rounds: int, dtype: str
) -> list[dict]:
    """Measure every variant; ratios divide the first variant by the others."""
    base = base_config(size, batch_size, dtype)
    mesh = one_device()
    batch = noise_on(mesh, base)
    programs = {}
    for name, changes in variants.items():
        programs[name] = compile_step(override(base, changes), mesh, batch)
        print(f"{size}: compiled {name!r} in {programs[name].compile_secs:.0f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(1 + rounds):  # the first round only warms up
        for name, program in programs.items():
            secs = time_step(program, batch)
            times[name] += [secs] * (number > 0)
        print(f"{size}: round {number} of {rounds}", flush=True)
    return [row(size, name, programs, times, batch_size) for name in programs]


def row(
    size: Size,
    name: str,
    programs: dict[str, Program],
    times: dict[str, list[float]],
    batch_size: int,
) -> dict:
    """Collect the figures of one variant."""
    first, program = next(iter(programs)), programs[name]
    faster = report.compare(times[first], times[name])
    return {
        "size": size,
        "variant": name,
        "gflops_per_clip": program.flops / batch_size / 1e9,
        "flops_ratio": programs[first].flops / program.flops,
        "temporary_gib": program.temporary_bytes / 2**30,
        "memory_ratio": programs[first].temporary_bytes / program.temporary_bytes,
        "secs_per_clip": statistics.median(times[name]) / batch_size,
        "time_ratio": faster["ratio"],
        "time_ratio_range": faster["ratio_range"],
    }


def format_table(rows: list[dict]) -> str:
    """Format a table; "x": how many times cheaper than the first row of the size."""
    head = ["ViT", "step", "billion operations a clip", "x", "temporary memory, GiB", "x"]
    cells = [
        [
            f"{r['size']}/16",
            r["variant"],
            f"{r['gflops_per_clip']:.0f}",
            f"{r['flops_ratio']:.2f}",
            f"{r['temporary_gib']:.2f}",
            f"{r['memory_ratio']:.2f}",
            f"{r['secs_per_clip']:.2f}",
            report.format_ratio({"ratio": r["time_ratio"], "ratio_range": r["time_ratio_range"]}),
        ]
        for r in rows
    ]
    return markdown_table([[*head, "s a clip", "x (range)"], *cells])


def main(
    sizes: tuple[Size, ...] = ("S", "B"),
    compare: Literal["parts", "adapters"] = "parts",
    batch_size: int = 4,
    rounds: int = 3,
    dtype: Literal["float32", "bfloat16"] = "float32",
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table and write cost_parts.md and cost_parts.json (or cost_adapters...).

    Args:
      sizes: S and B, or one of them.
      compare: SMAUG's parts with the dense model, or adapters with finetuning everything.
      batch_size: clips in a step.
      rounds: measured rounds, after one that warms up.
      dtype: of the activations; bfloat16 is slower than float32 on most CPUs.
      out_dir: where the table goes.
    """
    keep_freed_memory()  # as training does
    given = (VARIANTS[compare], batch_size, rounds, dtype)
    rows = [r for size in sizes for r in measure(size, *given)]
    settings = {"compare": compare, "batch_size": batch_size, "rounds": rounds, "dtype": dtype}
    report.write_report(out_dir, f"cost_{compare}", format_table(rows), settings, rows=rows)
    report.print_report(format_table(rows), settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
