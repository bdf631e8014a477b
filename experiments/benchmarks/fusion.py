"""Cost of fusing long clips and long texts: memory, FLOPs and time of the three fusions.

    python -m experiments.benchmarks.fusion
    python -m experiments.benchmarks.fusion --frames 4 16 --words 40 512 --part step

The fusion alone (`--part fusion`) is its forward and backward pass, down to the gradients of the
features of text and video, at the width of ViT-B/16 and BERT-base: three layers, 197 tokens a
frame. The whole training step (`--part step`) has both encoders, VTC, VTM, MLM and MCM, and encodes
frames in chunks. Memory is the compiler's temporary memory, beside arguments and results; only the
timed programs run. The growth of FLOPs is fitted on long clips and texts, where it dominates.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.benchmarks.cost import base_config, compile_step, one_device
from experiments.benchmarks.report import compare, format_ratio, print_report, write_report
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import build_model
from vlmae.ops.multiple_choice import SLOT
from vlmae.parallel.malloc import keep_freed_memory
from vlmae.runs.tables import markdown_table
from vlmae.training.step import abstract_batch

KINDS = ("multiway", "cross_attention", "concat")
PATCHES = 196
# Long, since linear terms hide the exponent on short inputs.
LONG_FRAMES = (128, 256, 512, 1024, 2048)
LONG_TEXTS = (8192, 16384, 32768, 65536, 131072)
TEMPLATE = (101, 2054, 102, SLOT, SLOT, SLOT, SLOT, 102)


class Shape(NamedTuple):
    """One case: the kind of fusion, and the lengths of clip and text."""

    kind: str
    frames: int
    words: int


def fusion_config(kind: str) -> ExperimentConfig:
    """Build the config of B/16 and BERT-base with one of the fusions, unmasked."""
    changes = {"model.fusion.kind": kind, "model.text.dropout": 0.0}
    return override(base_config("B", 1, "float32"), changes)


def features(shape: Shape, batch_size: int, width: int) -> tuple[TextFeatures, VideoFeatures]:
    """Abstract features of full texts and unmasked clips."""
    b, t = batch_size, shape.frames

    def of(dtype: str, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *size), dtype)

    return (
        TextFeatures(of("float32", shape.words, width), of("bool", shape.words)),
        VideoFeatures(
            of("float32", t, PATCHES, width),
            of("float32", t, width),
            (of("int32", t, PATCHES),),
            of("bool", t, PATCHES),
        ),
    )


def lower_fusion(shape: Shape, batch_size: int) -> tuple[Any, PyTree]:
    """Lower the fusion's forward and backward pass; return it with its abstract arguments."""
    config = fusion_config(shape.kind)
    model = build_model(config)
    text, video = features(shape, batch_size, config.model.video.width)
    init = functools.partial(model.init, jax.random.key(0), method="fuse")
    params = jax.eval_shape(init, video, text)

    def loss(params: PyTree, text_tokens: jax.Array, video_tokens: jax.Array, rest: PyTree):
        text, video = rest
        text, video = text._replace(tokens=text_tokens), video._replace(tokens=video_tokens)
        return jnp.square(model.apply(params, video, text, method="fuse")[:, 0]).sum()

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    arguments = (params, text.tokens, video.tokens, (text, video))
    return gradients.lower(*arguments), arguments


def step_memory(shape: Shape, batch_size: int) -> int:
    """Temporary bytes of the whole training step, frames encoded four at a time."""
    config = override(
        fusion_config(shape.kind),
        {
            "data.batch_size": batch_size,
            "data.text_len": shape.words,
            "data.train.0.num_frames": shape.frames,
            "model.video.mask.ratio": 0.0,
            "model.video.frames_per_chunk": 4,
            "model.remat": "full",
            "objectives.mvm": 0.0,
            "objectives.mcm": 1.0,
            "objectives.mcm_len": 512,
            "objectives.mcm_template_ids": TEMPLATE,
        },
    )
    mesh = one_device()
    return compile_step(config, mesh, abstract_batch(config)).temporary_bytes


def fusion_memory(shape: Shape, batch_size: int) -> int:
    """Temporary bytes of the fusion alone."""
    lowered, _ = lower_fusion(shape, batch_size)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def exponent(sizes: Sequence[int], flops: Sequence[float]) -> float:
    """Fit the slope of log FLOPs over log size.

    >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(flops), 1)[0])


def growth(kind: str) -> dict[str, Any]:
    """Fit the growth of a fusion's FLOPs with frames (at 40 words) and with words (at 1 frame)."""

    def flops(frames: int, words: int) -> float:
        return lower_fusion(Shape(kind, frames, words), 1)[0].cost_analysis()["flops"]

    by_frames = [flops(frames, 40) for frames in LONG_FRAMES]
    by_words = [flops(1, words) for words in LONG_TEXTS]
    return {
        "kind": kind,
        "frames_exponent": exponent(LONG_FRAMES, by_frames),
        "words_exponent": exponent(LONG_TEXTS, by_words),
        "flops_by_frames": dict(zip(LONG_FRAMES, by_frames, strict=True)),
        "flops_by_words": dict(zip(LONG_TEXTS, by_words, strict=True)),
    }


def prepare(shape: Shape, batch_size: int) -> Callable[[], float]:
    """Compile the fusion's pass; the returned function runs it once and returns its seconds."""
    lowered, arguments = lower_fusion(shape, batch_size)
    program = lowered.compile()
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        if x.dtype == jnp.float32:
            return jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))
        return jnp.ones(x.shape, x.dtype)

    arguments = jax.tree.map(fill, arguments)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return time.perf_counter() - start

    return run


def time_fusions(frames: int, words: int, batch_size: int, rounds: int) -> list[dict]:
    """Measure seconds of each fusion and its ratio to the first, after one warm-up round."""
    runs = {kind: prepare(Shape(kind, frames, words), batch_size) for kind in KINDS}
    # All kinds within a round, so that other jobs on the machine slow all alike.
    times = [{kind: run() for kind, run in runs.items()} for _ in range(1 + rounds)][1:]
    rows = []
    for kind in KINDS:
        own, first = ([secs[x] for secs in times] for x in (kind, KINDS[0]))
        secs_per_clip = statistics.median(own) / batch_size
        rows.append({"kind": kind, "secs_per_clip": secs_per_clip, **compare(own, first)})
    return rows


def format_memory(rows: Sequence[dict]) -> str:
    """Format MiB a clip: a row for each length of clip and text."""
    lines = []
    for frames, words in dict.fromkeys((row["frames"], row["words"]) for row in rows):
        of_shape = [row for row in rows if (row["frames"], row["words"]) == (frames, words)]
        by_kind = {row["kind"]: row["mib"] for row in of_shape}
        cells = [f"{by_kind[kind]:,.0f}" for kind in KINDS]
        ratio = by_kind["concat"] / by_kind["multiway"]
        lines.append([str(frames), str(words), *cells, f"{ratio:.1f}"])
    return markdown_table([["frames", "words", *KINDS, "concat / multiway"], *lines])


def format_growth(rows: Sequence[dict]) -> str:
    """Format the exponents."""
    cells = [
        (row["kind"], f"{row['frames_exponent']:.2f}", f"{row['words_exponent']:.2f}")
        for row in rows
    ]
    return markdown_table([["fusion", "operations ~ frames ^", "operations ~ words ^"], *cells])


def format_times(rows: Sequence[dict]) -> str:
    """Format seconds, and ratios within a round."""
    cells = [(row["kind"], f"{row['secs_per_clip']:.2f}", format_ratio(row)) for row in rows]
    return markdown_table([["fusion", "s a clip", "x multiway (range)"], *cells])


def plot_memory(rows: Sequence[dict], path: Path) -> None:
    """Plot memory against frames, a panel for each length of text."""
    from matplotlib.figure import Figure

    texts = list(dict.fromkeys(row["words"] for row in rows))
    figure = Figure(figsize=(3.4 * len(texts), 3.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(texts), sharey=True))
    for panel, words in zip(panels, texts, strict=True):
        for kind in KINDS:
            points = [r for r in rows if (r["kind"], r["words"]) == (kind, words)]
            x, y = zip(*[(r["frames"], r["mib"]) for r in points], strict=True)
            panel.loglog(x, y, marker="o", label=kind.replace("_", " "))
        panel.set_title(f"{words} words")
        panel.set_xlabel("frames")
        panel.set_xticks(x, [str(frames) for frames in x], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("temporary memory, MiB a clip")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main(
    part: Literal["fusion", "step"] = "fusion",
    frames: tuple[int, ...] = (4, 8, 16, 32, 64),
    words: tuple[int, ...] = (40, 128, 512),
    batch_size: int = 2,
    rounds: int = 3,
    timed: tuple[int, int] = (16, 512),
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the tables; write fusion.json, fusion.md and fusion_memory.png (or step...).

    Args:
      part: whose memory; growth and time are always those of the fusion alone.
      frames: of the clips.
      words: of the texts.
      batch_size: clips and texts.
      rounds: measured rounds, after one that warms up; 0 measures no time.
      timed: frames and words of the timed programs.
      out_dir: where the tables go.
    """
    keep_freed_memory()  # as training does
    measure = fusion_memory if part == "fusion" else step_memory
    memory = []
    for shape in (Shape(kind, t, n) for n in words for t in frames for kind in KINDS):
        mib = measure(shape, batch_size) / batch_size / 2**20
        memory.append(shape._asdict() | {"mib": mib})
        print(f"{shape}: {mib:,.0f} MiB a clip", flush=True)
    grown = [growth(kind) for kind in KINDS]
    times = time_fusions(*timed, batch_size, rounds) if rounds else []
    settings = {"part": part, "batch_size": batch_size, "rounds": rounds, "timed": timed}
    tables = f"{format_memory(memory)}\n\n{format_growth(grown)}\n\n{format_times(times)}"
    content = {"memory": memory, "growth": grown, "times": times}
    write_report(out_dir, part, tables, settings, **content)
    plot_memory(memory, out_dir / f"{part}_memory.png")
    print_report(tables, settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
