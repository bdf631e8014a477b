"""Kernels of a GPU's program, a lower bound of their time, and what crosses the network meanwhile.

Read from optimized HLO, in the order in which it is scheduled.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from vlmae.training.gpus import Gpu
from vlmae.training.step_cost import KINDS, result_bytes, split_computations

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations=\{)=?%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FREE = (
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all",
    "partition-id", "replica-id", "opt-barrier",
)  # fmt: skip
_FUSED_ATTENTION = "__cudnn$fmha"


class Kernel(NamedTuple):
    """An operation of a program that takes time on the GPU."""

    name: str
    kind: str  # HLO's opcode, or the target of a custom call
    bytes: int  # read and written at least
    flops: int  # of matrix products and fused attention
    times: int  # how often it runs

    def secs(self, gpu: Gpu) -> float:
        """Compute a lower bound of the time of all its runs."""
        return self.times * max(self.bytes / gpu.bytes_per_sec, self.flops / gpu.product_flops)


class Collective(NamedTuple):
    """An exchange between devices, in one run of a program."""

    kind: str
    bytes: int  # of its results on each device, of all its runs
    times: int
    is_async: bool  # begins and ends at different places of the schedule
    hidden_secs: float  # at least so long the kernels between the two take


class Schedule(NamedTuple):
    """Kernels and collectives of a program."""

    kernels: list[Kernel]
    collectives: list[Collective]

    def secs(self, gpu: Gpu) -> float:
        """Compute a lower bound of the time of one run: kernels run one after the other."""
        return sum(kernel.secs(gpu) for kernel in self.kernels)

    def calls(self) -> Counter:
        """Count the calls of cuDNN's attention in one run, by name."""
        found = Counter()
        for kernel in self.kernels:
            if kernel.kind.startswith(_FUSED_ATTENTION):
                found[kernel.kind.removeprefix("__cudnn$")] += kernel.times
        return found


def read_schedule(program: str, gpu: Gpu) -> Schedule:
    """Read `compiled.as_text()`; bodies of loops count as often as they run, if that is known."""
    computations, entry = split_computations(program)
    kernels: list[Kernel] = []
    collectives: list[Collective] = []

    def walk(name: str, times: int) -> None:
        shapes: dict[str, str] = {}
        started: dict[str, int] = {}  # collectives under way, and the kernels before them
        for line in computations.get(name, ()):
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            result, shape, op, rest = found.groups()
            shapes[result] = shape
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            kind = op.removesuffix("-start").removesuffix("-done")
            if kind in KINDS or op.startswith("async-"):
                if op.endswith("-start"):
                    started[result] = len(kernels)
                elif kind in KINDS:
                    first = next((started[x] for x in operands if x in started), None)
                    between = kernels[first:] if first is not None else []
                    hidden = sum(kernel.secs(gpu) for kernel in between)
                    size = times * result_bytes(shape)
                    collectives.append(Collective(kind, size, times, first is not None, hidden))
            elif op in ("while", "call", "conditional"):
                trips = _TRIPS.search(line)
                for called in _CALLED.findall(line):
                    walk(called, times * (int(trips[1]) if trips else 1))
            elif op not in _FREE:
                sizes = [result_bytes(shapes.get(x, "")) for x in operands]
                called = _CALLED.findall(line)
                inside = "\n".join(y for x in called for y in computations.get(x, ()))
                given = [shapes.get(x, "") for x in operands]
                target = _TARGET.search(line)
                kernels.append(
                    Kernel(
                        result,
                        target[1] if target else op,
                        moved_bytes(result_bytes(shape), sizes, inside or line),
                        product_flops(line, given, shape),
                        times,
                    )
                )

    walk(entry, 1)
    return Schedule(kernels, collectives)


def moved_bytes(result: int, operands: list[int], inside: str) -> int:
    """Bound the bytes that a kernel reads and writes, from below.

    Args:
      result: bytes of its result.
      operands: bytes of each of its operands.
      inside: its HLO.
    """
    if re.search(r"\b(?:scatter|dynamic-update-slice)\(", inside):  # in place: only the updates
        return 2 * sum(size for size in operands if size < result)
    if re.search(r"\b(?:gather|dynamic-slice)\(", inside):  # a part of what is large
        return result + sum(min(size, result) for size in operands)
    return result + sum(operands)


def product_flops(line: str, operands: list[str], result: str) -> int:
    """Count the FLOPs of a call of cuBLAS or of cuDNN's attention; 0 for any other kernel."""
    target = _TARGET.search(line)
    if target and target[1].startswith(_FUSED_ATTENTION):
        query, key = (dimensions(shape) for shape in operands[:2])
        products = 10 if "Backward" in target[1] else 4  # backward computes the weights again
        return products * math.prod(query) * key[1]  # [batch tokens heads width]
    contracted = _CONTRACTED.search(line)
    if not (target and contracted and operands):
        return 0
    axes = [int(x) for x in re.findall(r"\d+", contracted[1])]
    left = dimensions(operands[0])
    return 2 * math.prod(dimensions(result)) * math.prod(left[axis] for axis in axes)


def dimensions(shape: str) -> list[int]:
    """Read the first shape of a text.

    >>> dimensions("(bf16[8,64]{1,0}, s8[1024])")
    [8, 64]
    """
    found = re.search(r"\w+\[([\d,]*)\]", shape)
    return [int(x) for x in found[1].split(",") if x] if found else []


def rounded_scatters(program: str) -> Iterator[str]:
    """Yield the scatters of an optimized or lowered program that add in bfloat16."""
    for line in program.splitlines():
        if re.search(r"= bf16\[[\d,]*\]\S* scatter\(", line):
            yield line.strip()
