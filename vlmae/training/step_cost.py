"""Cost of a training step: its FLOPs by part of the model, and the bytes that devices exchange.

FLOPs are counted in the jaxpr; a multiplication with its addition is two. Counted are matrix
products, convolutions and cuDNN's fused attention: forward, backward, and what is recomputed for
the backward pass. A loop counts as often as it runs. Not counted is what works element by element
(norms, softmax, activations, dropout, losses, the optimizer), what moves data (gathers, embedding
tables), and the attention weights that cuDNN recomputes inside its backward kernel. Products whose
results nobody uses are dropped first, as the compiler drops them. Products that XLA finds twice and
computes once, such as the similarities by which VTM mines negatives, count twice.

The name stack of an equation says where it comes from: Flax writes modules and their methods there,
JAX its transformations. Bytes are read from the optimized HLO.
"""

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

FIRST_PASS = "first_pass"  # scope of GradCache's first pass, see `vlmae.training.gradients`
OWN_ROWS = ("temporal", "frame_selector")  # submodules that the table shows by themselves
FUSED_ATTENTION = re.compile(r"dot_product_attention_(?:fp8_)?(fwd|bwd)(?:_wrapper)?")
BNTH = 1  # layout of fused attention with heads before tokens; 0 is [batch tokens heads width]


class Flops(NamedTuple):
    """FLOPs of a part of the model in a training step."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0  # forward once more, for the backward pass: what was not kept

    @property
    def total(self) -> int:
        """Sums the three."""
        return sum(self)


class Product(NamedTuple):
    """A matrix product, convolution or fused attention of a program."""

    flops: int  # of all times that it runs
    path: str  # name stacks of the equation and of all that call it: "jvp(Model.fuse)/fusion/..."


def count_flops(step: ClosedJaxpr) -> dict[str, Flops]:
    """FLOPs of a step by part of the model (`part_of`), in the order in which parts first occur.

    Args:
      step: the trace of a function, such as `jax.jit(step).trace(state, batch).jaxpr`. With several
        devices its shapes, and so the counts, are those of the whole batch.
    """
    # The trace still holds what the compiler drops, such as the model in `weights_of`.
    needed, _ = dce_jaxpr(step.jaxpr, [True] * len(step.jaxpr.outvars))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(Flops._fields, 0))
    for flops, path in products(needed):
        counts[part_of(path)][kind_of(path)] += flops
    return {part: Flops(**kinds) for part, kinds in counts.items()}


def sum_flops(parts: dict[str, Flops]) -> Flops:
    """Sum all parts."""
    return Flops(*(sum(kind) for kind in zip(*parts.values(), strict=True)))


def products(jaxpr: Jaxpr, path: str = "", times: int = 1) -> Iterator[Product]:
    """Walk a program and the functions that it calls, and yield their products.

    Of a conditional the branch with the most FLOPs counts. Nobody knows how often a `while` loop
    runs; its products count once, with a warning.

    Args:
      jaxpr: the program.
      path: name stacks of what calls it.
      times: how often it runs.
    """
    for eqn in jaxpr.eqns:
        name, here = eqn.primitive.name, f"{path}/{eqn.source_info.name_stack}"
        # A fused kernel is one equation; what is inside it must not count again.
        if fused := FUSED_ATTENTION.fullmatch(name):
            flops = fused_attention_flops(eqn, backward=fused[1] == "bwd")
        else:
            flops = PRODUCTS[name](eqn) if name in PRODUCTS else 0
        if flops:
            yield Product(times * flops, here)
            continue
        repeats = times * eqn.params["length"] if name == "scan" else times
        called = [list(products(inner, here, repeats)) for inner in inner_jaxprs(eqn)]
        if name == "cond":
            called = [max(called, key=lambda branch: sum(product.flops for product in branch))]
        if name == "while" and any(called):
            warnings.warn(f"{here}: products in a while loop count once", stacklevel=2)
        for found in called:
            yield from found


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """Find the programs among an equation's parameters: bodies, branches, called functions."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def dot_flops(eqn: JaxprEqn) -> int:
    """FLOPs of a `dot_general`."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def conv_flops(eqn: JaxprEqn) -> int:
    """FLOPs of a convolution, padding included; zeros between dilated inputs are not."""
    kernel, params = eqn.invars[1].aval, eqn.params
    # By output features: the kernel's size over them is what one output value reads, groups
    # included.
    features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    outputs = features * math.prod(params["lhs_dilation"])
    return 2 * eqn.outvars[0].aval.size * kernel.size // outputs


def fused_attention_flops(eqn: JaxprEqn, backward: bool) -> int:
    """FLOPs of cuDNN's attention: logits and weighted values; backward two products for each."""
    query, key = (x.aval.shape for x in eqn.invars[:2])
    keys = key[2] if eqn.params["layout"] == BNTH else key[1]
    return (8 if backward else 4) * math.prod(query) * keys


PRODUCTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": dot_flops,
    "conv_general_dilated": conv_flops,
}


def part_of(path: str) -> str:
    """Return the part of the model of a product: the model's method that objectives call.

    Some submodules are parts of their own (`OWN_ROWS`), and so is the first pass of GradCache.

    >>> part_of("/transpose(jvp(VideoLanguageModel.fuse))/fusion/block_0/attention/query")
    'fuse'
    >>> part_of("/jvp(VideoLanguageModel.fuse)/frame_selector/score")
    'frame_selector'
    >>> part_of("/jvp()")
    'losses'
    """
    scopes = re.split(r"[/()]+", path)
    own = next((name for name in (FIRST_PASS, *OWN_ROWS) if name in scopes), "")
    method = next((scope.partition(".")[2] for scope in scopes if "." in scope), "losses")
    return own or method


def kind_of(path: str) -> str:
    """Return the field of `Flops` in which a product counts.

    The mark of recomputation comes first: the backward pass of a recomputed block carries that of
    transposition too.
    """
    if "rematted_computation" in path or FIRST_PASS in path:
        return "recomputed"
    return "backward" if "transpose(" in path else "forward"


KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# An asynchronous pair counts where it ends, since only there its result stands alone.
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-done)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|body|condition)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collective_bytes(program: str) -> dict[str, int]:
    """Sum the bytes of the results of all collectives in one run of a program, on each device.

    The traffic depends on the algorithm: around a ring of n devices, an all-gather moves
    (n - 1) / n of its result, an all-reduce twice as much, a reduce-scatter n - 1 times its result.
    The body of a loop counts as often as it runs, or once if the compiler does not know how often.

    Args:
      program: `compiled.as_text()`, optimized HLO.

    Returns:
      Bytes by kind ("all-reduce", ...); only kinds that occur.
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
    """Split HLO text into the lines of each computation by name, and name the entry."""
    computations, entry, lines = {}, "", []  # lines before the first head belong to none
    for line in program.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return computations, entry


def result_bytes(shape: str) -> int:
    """Count the bytes of a shape as HLO writes it, or of all shapes of a tuple.

    >>> result_bytes("(f32[8,64]{1,0}, bf16[3]{0}, pred[])")
    2055
    """
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * max(int(bits or 8) // 8, 1)
        for _, bits, sizes in _ARRAY.findall(shape)
    )


def describe_bytes(counts: dict[str, int]) -> str:
    """Format bytes by kind, largest first: "all-reduce 12.3 MB, all-gather 4.5 MB"."""
    parts = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in parts) or "nothing"
