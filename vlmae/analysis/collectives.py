"""What crosses the network in a compiled program, read from XLA's text of it."""

import math
import re
from collections import Counter

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# An asynchronous pair is counted where it ends; only there its result stands alone.
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-done)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|body|condition)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collective_bytes(program: str) -> dict[str, int]:
    """Bytes of the results of all collectives that one run of a program makes on each device.

    What goes over the wires depends on the algorithm: around a ring of n devices, an all-gather
    moves (n - 1) / n of its result, an all-reduce twice as much, a reduce-scatter n - 1 times its
    result. The body of a loop counts as often as it runs, if the compiler knows how often; else
    once.

    Args:
      program: `compiled.as_text()`, optimized HLO.

    Returns:
      Bytes by kind ("all-reduce", ...), only of the kinds that occur.
    """
    computations, entry = split_computations(program)

    def total(name: str) -> Counter:
        counts = Counter()
        for line in computations.get(name, ()):
            found = _COLLECTIVE.search(line)
            if found:
                counts[found[2]] += result_bytes(found[1])
            trips = _TRIPS.search(line)
            for called in _CALLED.findall(line):
                for kind, size in total(called).items():
                    counts[kind] += size * (int(trips[1]) if trips else 1)
        return counts

    return dict(total(entry))


def split_computations(program: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that starts."""
    computations, entry, lines = {}, "", []
    for line in program.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return computations, entry


def result_bytes(shape: str) -> int:
    """Bytes of a shape in HLO's words, or of all of a tuple's.

    >>> result_bytes("(f32[8,64]{1,0}, bf16[3]{0}, pred[])")
    2055
    """
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * max(int(bits or 8) // 8, 1)
        for _, bits, sizes in _ARRAY.findall(shape)
    )


def describe_bytes(counts: dict[str, int]) -> str:
    """In a line: "all-reduce 12.3 MB, all-gather 4.5 MB"; what is largest comes first."""
    parts = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in parts) or "nothing"
