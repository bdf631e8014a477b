"""Measurements of `experiments.benchmarks.gpu`, each task in one process and within a budget.

Steps are timed many in a row with one synchronization at the end, as in training. Each result is
written as soon as it is known.
"""

import concurrent.futures as futures
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import torch
import tyro

from experiments.benchmarks import sides
from experiments.benchmarks.cost import noise_on, one_device
from experiments.benchmarks.own_process import in_own_process
from experiments.benchmarks.report import measured_on
from experiments.benchmarks.step import TOLERANCE
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.training.batch_size import program_bytes, try_batch
from vlmae.training.operations import trace_gradients
from vlmae.training.step import abstract_batch, make_init, make_step, run_values, sharded_init
from vlmae.training.step_cost import count_flops, sum_flops

GIB = 2**30
VARIANTS = {"masked": "SMAUG, masked 0.65"}  # names without commas, for lines
TINY: dict[str, Any] = {
    "data.image_size": 64,
    "model.video.width": 48,
    "model.video.depth": 2,
    "model.video.num_heads": 4,
    "model.video.mlp_dim": 80,
    "model.video.sparsify.stages": (1,),
    "model.text.width": 48,
    "model.text.depth": 1,
    "model.text.num_heads": 4,
    "model.text.mlp_dim": 64,
    "model.fusion.depth": 1,
    "model.pixel_decoder.width": 32,
    "model.pixel_decoder.depth": 1,
    "model.pixel_decoder.num_heads": 2,
}


@dataclass
class Task:
    """What a task may use, and where its results go."""

    name: str
    out: Path
    budget: float
    tiny: bool
    steps: int = 20
    repeats: int = 5
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.budget - (time.monotonic() - self.start)

    def write(self, **values: Any) -> None:
        """Append a result to NAME.jsonl, and print it."""
        text = json.dumps({**values, "at_secs": round(time.monotonic() - self.start, 1)})
        print(text, flush=True)
        with (self.out / f"{self.name}.jsonl").open("a") as file:
            file.write(text + "\n")

    def config(self, line: str) -> ExperimentConfig:
        """Build the config of a line, "B,4,SMAUG,64" and more fields as NAME=VALUE."""
        size, frames, name, clips, *more = line.split(",")
        variant, rows = VARIANTS.get(name, name), 4 if self.tiny else int(clips)
        config = sides.variant_config("S" if size == "S" else "B", int(frames), variant, rows)
        changes = dict(text.split("=") for text in more)
        return override(config, (TINY if self.tiny else {}) | changes)

    def timed(self, run: Callable[[], object], wait: Callable[[], object]) -> dict[str, Any]:
        """Time steps in a row: the median of the repeats, and their range, in milliseconds."""
        for _ in range(2):  # warms up
            run()
        wait()
        secs = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            for _ in range(self.steps):
                run()
            wait()
            secs.append((time.perf_counter() - start) / self.steps)
        low, middle, high = min(secs), statistics.median(secs), max(secs)
        return {"ms": middle * 1e3, "ms_range": [low * 1e3, high * 1e3]}


def machine(task: Task) -> None:
    """Measure how fast products and copies are, and write the versions."""
    task.write(**measured_on())
    size, in_a_row = (256, 5) if task.tiny else (8192, 50)
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    y = jnp.ones(2**20 if task.tiny else 2**30, jnp.float32)
    add = jax.jit(lambda y: y + 1, donate_argnums=0)
    jax.block_until_ready((product(x, x), y := add(y)))
    start = time.perf_counter()
    for _ in range(in_a_row):
        last = product(x, x)
    last.block_until_ready()
    task.write(product_tflops=in_a_row * 2 * size**3 / (time.perf_counter() - start) / 1e12)
    start = time.perf_counter()
    for _ in range(20):
        y = add(y)
    y.block_until_ready()
    task.write(copy_tb_per_sec=20 * 2 * y.nbytes / (time.perf_counter() - start) / 1e12)


def equal(task: Task) -> None:
    """Compare the losses of both sides from the same weights and random choices."""
    for line in ("S,4,SMAUG,8", "S,4,dense,8"):
        if task.left() < 30:
            task.write(line=line, error="no time left")
            continue
        ours, theirs = in_own_process(sides.losses_of, task.config(line))
        allowed = TOLERANCE[sides.DTYPE]
        equal = abs(ours - theirs) <= allowed * abs(theirs)
        task.write(line=line, ours=ours, peer=theirs, tolerance=allowed, equal=equal)


def compile_line(task: Task, line: str) -> tuple[Any, ...]:
    """Compile our step of a line."""
    config, mesh = task.config(line), one_device()
    batch, init = noise_on(mesh, config), jax.jit(make_init(config))
    start, state = time.perf_counter(), jax.eval_shape(init, 0)
    lowered = make_step(config, mesh, state).lower(state, batch, run_values(config))
    return config, batch, init, lowered.compile(), time.perf_counter() - start


def compiled_lines(task: Task, lines: tuple[str, ...]) -> Iterator[tuple[str, tuple]]:
    """Yield what is compiled in time; compilers run first, as they would disturb a measurement."""
    with futures.ThreadPoolExecutor(4) as pool:
        jobs = {pool.submit(compile_line, task, line): line for line in lines}
        done = futures.wait(jobs, timeout=max(0.6 * task.left(), 1)).done
        for job, line in jobs.items():
            if job not in done:
                task.write(line=line, error="not compiled within the budget")
            elif error := job.exception():
                task.write(line=line, error=f"{type(error).__name__}: {str(error)[:500]}")
        for job, line in jobs.items():
            if job in done and not job.exception():
                yield line, job.result()
        os._exit(0)  # compilations that still run are not waited for


def ours(task: Task, lines: tuple[str, ...]) -> None:
    """Time our steps, and write a profile of the first line."""
    for number, (line, (config, batch, init, program, secs)) in enumerate(
        compiled_lines(task, lines)
    ):
        if task.left() < 10:
            task.write(line=line, error="no time left")
            continue
        held: list[Any] = [init(0), None]

        inputs = batch, run_values(config)

        def run(held: list = held, program: Callable = program, inputs: Any = inputs) -> None:
            held[:] = program(held[0], *inputs)

        def wait(held: list = held) -> None:
            jax.block_until_ready(held)

        measured = task.timed(run, wait)
        frames = config.data.train[0].num_frames
        flops = sum_flops(count_flops(trace_gradients(config, frames))).total
        stats = jax.devices()[0].memory_stats() or {}
        task.write(
            line=line,
            compile_secs=secs,
            program_gib=program_bytes(program) / GIB,
            peak_gib=stats.get("peak_bytes_in_use", 0) / GIB,
            tflops=flops / (measured["ms"] / 1e3) / 1e12,
            loss=float(held[1]["loss/total"]),
            **measured,
        )
        if number == 0:
            with jax.profiler.trace(task.out / "profile"):
                for _ in range(3):
                    run()
                wait()
        held.clear()


def peer(task: Task, lines: tuple[str, ...], forms: tuple[sides.Form, ...]) -> None:
    """Time PyTorch's steps in each form: bfloat16 autocast, flash attention, fused AdamW."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for line in lines:
        for form in forms:
            if task.left() < 20:
                task.write(line=line, form=form, error="no time left")
                continue
            try:
                measure_peer(task, line, form)
            except Exception as error:  # of any kind: the next line may run all the same
                task.write(line=line, form=form, error=f"{type(error).__name__}: {error!s:.500}")
            if sides.ON_GPU:
                torch.cuda.empty_cache()


def measure_peer(task: Task, line: str, form: sides.Form) -> None:
    """Time one line in one form."""
    torch._dynamo.reset()
    start = time.perf_counter()
    side = sides.PeerSide(task.config(line), form)
    wait = torch.cuda.synchronize if sides.ON_GPU else (lambda: None)
    side.queue_step()
    wait()
    first_secs = time.perf_counter() - start
    if sides.ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    measured = task.timed(side.queue_step, wait)
    peak = torch.cuda.max_memory_allocated() if sides.ON_GPU else 0
    task.write(line=line, form=form, first_secs=first_secs, peak_gib=peak / GIB, **measured)


def largest(task: Task) -> None:
    """Find the largest batch that the compiler believes to fit, and run it."""
    for line in ("B,4,SMAUG,64", "B,4,dense,64"):
        if task.left() < 40:
            task.write(line=line, error="no time left")
            continue
        config, mesh = task.config(line), one_device()
        init, limit = sharded_init(config, mesh), _limit_bytes()
        sizes = (4, 8) if task.tiny else (32, 64)
        needed = []
        for size in sizes:
            shapes = abstract_batch(config, batch_size=size)
            needed.append(try_batch(config, mesh, init, shapes, 0).needed_bytes)  # compiles alone
        by_clip = (needed[1] - needed[0]) / (sizes[1] - sizes[0])
        clips = 12 if task.tiny else int(sizes[0] + (limit - needed[0]) / by_clip)
        trial = try_batch(config, mesh, init, abstract_batch(config, batch_size=clips), limit)
        stats = jax.devices()[0].memory_stats() or {}
        task.write(
            line=line,
            clips=clips,
            needed_gib=(trial.needed_bytes or 0) / GIB,
            peak_gib=stats.get("peak_bytes_in_use", 0) / GIB,
            fits="yes" if trial.fits else "no",
        )


def _limit_bytes() -> int:
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 8 * GIB)


def main(
    name: tyro.conf.Positional[Literal["machine", "equal", "ours", "peer", "largest"]],
    out: Path,
    budget: float = 200.0,
    lines: tuple[str, ...] = (),
    forms: tuple[sides.Form, ...] = ("compiled",),
    tiny: bool = False,
) -> None:
    """Run one task.

    Args:
      name: of the task.
      out: NAME.jsonl goes there.
      budget: seconds.
      lines: steps as "size,frames,variant,clips".
      forms: of PyTorch's step.
      tiny: tiny sizes and few steps.
    """
    repeats, steps = (2, 2) if tiny else (5, 20)
    task = Task(name, out, budget, tiny, steps, repeats)
    arguments = {"ours": (lines,), "peer": (lines, forms)}.get(name, ())
    {"machine": machine, "equal": equal, "ours": ours, "peer": peer, "largest": largest}[name](
        task, *arguments
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
