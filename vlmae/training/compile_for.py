"""Compile a training step for GPUs that are not here: `vlmae compile RUN --target 8xh100`.

What comes out is compiled, not run: memory, calls of cuDNN's attention and collectives are those of
the program; the time is a lower bound, which no kernel reaches.
"""

import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax

from data_pipelines.schema.checks import check
from vlmae.config.experiment import ExperimentConfig, load_config
from vlmae.config.phases import Segment, segments
from vlmae.config.tree import override
from vlmae.ops.multiple_choice import SLOT
from vlmae.parallel.sharding import bytes_per_device
from vlmae.runs.tables import markdown_table
from vlmae.training.gpus import (
    GIB,
    WITHOUT_MEASURING,
    Target,
    as_on,
    described_devices,
    parse_target,
)
from vlmae.training.kernels import Schedule, read_schedule
from vlmae.training.step import abstract_batch, make_checked_mesh, make_step, run_values
from vlmae.training.step_cost import count_flops, sum_flops

BERT_WORDS = 30522  # vocabulary of a config that takes its own from the data


class Memory(NamedTuple):
    """Bytes of a step on each device."""

    state: int  # parameters and optimizer state
    batch: int
    temporary: int  # activations, gradients, workspaces
    results: int  # those that do not take the place of the old state

    @property
    def total(self) -> int:
        """Sums all."""
        return sum(self)


class CompiledFor(NamedTuple):
    """A training step, compiled for a target."""

    target: Target
    text: str  # optimized HLO
    memory: Memory
    flops: int  # of the products of all devices
    schedule: Schedule
    compile_secs: float

    @property
    def least_secs(self) -> float:
        """Lower bound of the time of a step, without what crosses the network."""
        return self.schedule.secs(self.target.gpu)


def compile_for(target: Target, config: ExperimentConfig) -> CompiledFor:
    """Compile the training step of an experiment for described GPUs.

    Args:
      target: the GPUs.
      config: with all that the data decide, see `with_defaults`; `data.batch_size` is that of all
        devices together.

    Raises:
      UserError: nothing can be compiled here for GPUs; the mesh does not fit them or the model.
    """
    mesh = make_checked_mesh(config, described_devices(target))
    state, batch = abstract_state(config), abstract_batch(config)
    start = time.perf_counter()
    with jax.set_mesh(mesh), as_on(target):
        traced = make_step(config, mesh, state).trace(state, batch, run_values(config))
        compiled = traced.lower().compile(WITHOUT_MEASURING)
    secs, memory, text = time.perf_counter() - start, compiled.memory_analysis(), compiled.as_text()
    batch_bytes = bytes_per_device(batch, mesh)
    return CompiledFor(
        target,
        text,
        Memory(
            state=memory.argument_size_in_bytes - batch_bytes,
            batch=batch_bytes,
            temporary=memory.temp_size_in_bytes,
            results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        ),
        sum_flops(count_flops(traced.jaxpr)).total,
        read_schedule(text, target.gpu),
        secs,
    )


def with_defaults(config: ExperimentConfig) -> ExperimentConfig:
    """Fill in what the data would decide, where a config leaves it to them.

    The vocabulary is BERT's, texts are as long as the model reads, and the words of MCM's template
    have an id each.

    Raises:
      UserError: the number of classes is open, which only the data know.
    """
    objectives, classified = config.objectives, config.data.task in ("questions", "labels")
    classes = config.model.num_classes or not classified or objectives.answer_kind == "decoder"
    check(bool(classes), "--model.num-classes=0 takes the number from the data: give it here")
    changes: dict[str, object] = {
        "model.text.vocab_size": config.model.text.vocab_size or BERT_WORDS,
        "data.text_len": config.data.text_len or config.model.text.max_len,
    }
    if objectives.mcm and not objectives.mcm_template_ids:
        words = objectives.mcm_template.replace("{}", " {} ").split()
        changes["objectives.mcm_template_ids"] = tuple(SLOT if x == "{}" else 1 for x in words)
    return override(config, changes)


def describe(compiled: CompiledFor, clips: int) -> str:
    """Format all figures as tables in Markdown; `clips` is the batch size."""
    target, memory, gpu = compiled.target, compiled.memory, compiled.target.gpu
    count = target.nodes * target.gpus
    rows = [["memory of a GPU", "GiB"]]
    rows += [[name, f"{getattr(memory, name) / GIB:.2f}"] for name in Memory._fields]
    rows += [["all", f"{memory.total / GIB:.2f}"]]
    rows += [["a run takes at most", f"{target.limit_bytes / GIB:.2f}"]]
    calls = ", ".join(f"{name} {n}" for name, n in sorted(compiled.schedule.calls().items()))
    secs, flops = compiled.least_secs, compiled.flops / count
    lines = [
        f"Compiled for {count} x {gpu.name}, not run; {compiled.compile_secs:.0f} s.",
        markdown_table(rows),
        f"cuDNN's attention: {calls or 'not called'}.",
        f"Products: {compiled.flops / clips / 1e9:.1f} GFLOPs a clip, {flops / 1e12:.2f} TFLOPs a "
        f"GPU and step: at least {flops / gpu.product_flops * 1e3:.1f} ms at "
        f"{gpu.product_flops / 1e12:.0f} TFLOP/s.",
        f"A step takes at least {secs * 1e3:.1f} ms: each of {len(compiled.schedule.kernels)} "
        f"kernels what its bytes take at {gpu.bytes_per_sec / 1e12:.2f} TB/s, or its products.",
    ]
    if count > 1:
        lines.append(collectives_table(compiled))
    return "\n\n".join(lines)


def collectives_table(compiled: CompiledFor) -> str:
    """Format the collectives by kind: bytes, and how much of them runs beside kernels."""
    rate = compiled.target.gpu.link_bytes_per_sec
    by_kind: dict[str, list] = {}
    for found in compiled.schedule.collectives:
        by_kind.setdefault(found.kind, []).append(found)
    rows = [["collective", "times", "MB", f"ms at {rate / 1e9:.0f} GB/s", "beside kernels, ms"]]
    for kind, found in sorted(by_kind.items()):
        # As much of each as the kernels between its begin and its end can hide.
        hidden = sum(min(x.bytes / rate, x.hidden_secs) for x in found)
        size = sum(x.bytes for x in found)
        times = Counter(x.is_async for x in found)
        rows.append(
            [
                kind,
                f"{sum(x.times for x in found)} ({times[True]} asynchronous)",
                f"{size / 1e6:.2f}",
                f"{size / rate * 1e3:.3f}",
                f"{hidden * 1e3:.3f}",
            ]
        )
    return markdown_table(rows)


def compile_command(source: Path, target: str = "h100", program: Path | None = None) -> None:
    """Print memory, cuDNN calls, FLOPs, a lower bound of the time, and collectives of a step.

    The GPUs need not be here: they are described by their published figures. Of several phases the
    largest step is compiled.

    Args:
      source: a work directory, or a config that `--print-config` of an experiment has printed.
      target: the GPUs: h100, a100, a6000 or l4; 8xh100 are eight of one node, 2x8xh100 of two.
      program: write the optimized program (HLO) to this file.

    Raises:
      UserError: see `compile_for` and `with_defaults`.
    """
    config = with_defaults(load_config(source / "config.json" if source.is_dir() else source))
    config = max(segments(config), key=Segment.visible_patches).config
    compiled = compile_for(parse_target(target), config)
    print(describe(compiled, config.data.batch_size))
    if program:
        program.write_text(compiled.text)
