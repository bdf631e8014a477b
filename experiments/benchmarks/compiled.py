"""Memory and cost of training steps, compiled for an H100 that is not there.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.compiled

ViT-B/16 and BERT-base in bfloat16, random weights, 32 words a text. Each step is compiled, which
takes a minute or two on two cores, and nothing is run. Needs JAX's plugin for CUDA, see
docs/guide/gpu.md. What is compiled is kept in compiled.jsonl and not compiled again.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.benchmarks.cost import ADAPTERS, FULL, MASKED, base_config
from experiments.benchmarks.report import print_report, write_report
from vlmae.config.tree import override
from vlmae.runs.tables import markdown_table
from vlmae.training.batch_size import largest_on_line
from vlmae.training.compile_for import compile_for
from vlmae.training.gpus import GIB, GPUS, parse_target

# [CLS] what does it show [SEP] (a) {} (b) {} (c) {} (d) {} [SEP]; the token ids are arbitrary
QUESTION = (101, 1996, 102, 1997, -1, 1998, -1, 1999, -1, 2000, -1, 102)
DENSE: dict[str, Any] = {}
NO_MASK = {
    "model.video.mask.scheme": "none",
    "model.video.mask.ratio": 0.0,
    "objectives.mvm": 0.0,
}
MULTI = NO_MASK | {
    "model.fusion.kind": "multiway",
    "objectives.mcm": 1.0,
    "objectives.mcm_template_ids": QUESTION,
}
LONG = NO_MASK | {
    "data.train.0.num_frames": 32,
    "data.text_len": 256,
    "model.text.max_len": 512,
}


class Case(NamedTuple):
    """A step to compile."""

    clips: int  # of all devices
    changes: dict[str, Any]
    target: str = "h100"


STEPS = {
    "dense": Case(32, DENSE),
    "dense xla": Case(32, {"model.attention": "xla"}),
    "dense remat selective": Case(32, {"model.remat": "selective"}),
    "dense remat full": Case(32, {"model.remat": "full"}),
    "dense accumulate 4": Case(32, {"optim.accumulate_steps": 4}),
    "masked": Case(32, MASKED),
    "smaug": Case(32, FULL),
    "multi": Case(32, MULTI),
}
ADAPTED = {
    "all finetuned": Case(32, ADAPTERS["all finetuned"]),
    "side adapters": Case(32, ADAPTERS["shallow blocks frozen, side adapters"]),
    "inline adapters": Case(32, ADAPTERS["shallow blocks frozen, inline adapters"]),
}
LONG_INPUTS = {
    "long multiway": Case(8, LONG | {"model.fusion.kind": "multiway"}),
    "long cross": Case(8, LONG | {"model.fusion.kind": "cross_attention"}),
    "long concat": Case(8, LONG | {"model.fusion.kind": "concat"}),
}
LARGE = {
    "dense 128": Case(128, DENSE),
    "smaug 128": Case(128, FULL),
    "multi 128": Case(128, MULTI),
}
SEVERAL = {
    "8 data": Case(256, FULL, "8xh100"),
    "8 fsdp": Case(256, FULL | {"mesh.fsdp": 8, "mesh.data": 1}, "8xh100"),
}
CASES = STEPS | ADAPTED | LONG_INPUTS | LARGE | SEVERAL
TITLES = {
    "dense": "dense, all four objectives",
    "dense xla": "dense, attention by XLA",
    "dense remat selective": "dense, `--model.remat selective`",
    "dense remat full": "dense, `--model.remat full`",
    "dense accumulate 4": "dense, `--optim.accumulate-steps 4`",
    "masked": "masked 0.65",
    "smaug": "all of SMAUG",
    "multi": "MuLTI (sampler, MCM; nothing masked)",
    "all finetuned": "dense without MVM, all finetuned",
    "side adapters": "shallow blocks frozen, side adapters",
    "inline adapters": "shallow blocks frozen, inline adapters",
    "long multiway": "sampler (MuLTI)",
    "long cross": "cross-attention",
    "long concat": "concatenation",
    "8 data": "`data`",
    "8 fsdp": "`fsdp`",
}


def compile_case(name: str) -> dict[str, Any]:
    """Compile a case; returns its figures."""
    case = CASES[name]
    config = override(base_config("B", case.clips, "bfloat16"), case.changes)
    compiled = compile_for(parse_target(case.target), config)
    return {
        "name": name,
        "target": case.target,
        "batch": case.clips,
        "memory": compiled.memory._asdict(),
        "total": compiled.memory.total,
        "flops": compiled.flops,
        "least_ms": compiled.least_secs * 1e3,
        "calls": dict(compiled.schedule.calls()),
        "collectives": [x._asdict() for x in compiled.schedule.collectives],
        "secs": compiled.compile_secs,
    }


def step_table(names: dict[str, Case], head: str, found: dict[str, dict]) -> str:
    """Format the figures of steps; "x": how many times less than the first one."""
    rows = [[head, "temporary GiB", "x", "all GiB", "TFLOPs", "ms at least", "x", "cuDNN calls"]]
    first = found.get(next(iter(names)))
    for name in names:
        if not (x := found.get(name)) or not first:
            continue
        temporary = x["memory"]["temporary"]
        rows.append(
            [
                TITLES[name],
                f"{temporary / GIB:.2f}",
                f"{first['memory']['temporary'] / temporary:.2f}",
                f"{x['total'] / GIB:.2f}",
                f"{x['flops'] / 1e12:.1f}",
                f"{x['least_ms']:.1f}",
                f"{first['least_ms'] / x['least_ms']:.2f}",
                str(sum(x["calls"].values())),
            ]
        )
    return markdown_table(rows)


def largest_table(found: dict[str, dict]) -> str:
    """Format the largest batches, by the straight line through two compiled ones."""
    kinds = ("a6000", "h100")
    rows = [["step", "GiB a clip", *(f"clips on {GPUS[kind].name}" for kind in kinds)]]
    for name in ("dense", "smaug", "multi"):
        if name not in found or f"{name} 128" not in found:
            continue
        # Two more batches lie on the device while a step runs.
        points = [
            (x["batch"], x["total"] + 2 * x["memory"]["batch"])
            for x in (found[name], found[f"{name} 128"])
        ]
        by_clip = (points[1][1] - points[0][1]) / (points[1][0] - points[0][0])
        limits = (parse_target(kind).limit_bytes for kind in kinds)
        clips = [str(largest_on_line(points, limit)) for limit in limits]
        rows.append([TITLES[name], f"{by_clip / GIB:.3f}", *clips])
    return markdown_table(rows)


def network_table(found: dict[str, dict]) -> str:
    """Format what eight devices exchange in a step."""
    rate = GPUS["h100"].link_bytes_per_sec
    rows = [
        ["SMAUG, cut by", "all GiB", "collective", "MB", "ms at 450 GB/s", "beside kernels, ms"]
    ]
    for name in SEVERAL:
        kinds: dict[str, list[dict]] = {}
        for x in found.get(name, {}).get("collectives", ()):
            kinds.setdefault(x["kind"], []).append(x)
        for kind, exchanged in sorted(kinds.items()):
            size = sum(x["bytes"] for x in exchanged)
            hidden = sum(min(x["bytes"] / rate, x["hidden_secs"]) for x in exchanged)
            total = f"{found[name]['total'] / GIB:.2f}"
            cells = (f"{size / 1e6:.2f}", f"{size / rate * 1e3:.3f}", f"{hidden * 1e3:.3f}")
            rows.append([TITLES[name], total, kind, *cells])
    return markdown_table(rows)


def format_tables(found: dict[str, dict]) -> str:
    """Format all tables of what is compiled."""
    return "\n\n".join(
        [
            step_table(STEPS, "4 frames, 32 clips", found),
            step_table(ADAPTED, "4 frames, 32 clips", found),
            step_table(LONG_INPUTS, "32 frames, 256 words, 8 clips", found),
            largest_table(found),
            network_table(found),
        ]
    )


def main(cases: tuple[str, ...] = tuple(CASES), out_dir: Path = Path("runs/benchmarks")) -> None:
    """Compile what is not compiled yet; write compiled.md and compiled.json after each.

    Args:
      cases: names of the steps to compile.
      out_dir: where the tables and compiled.jsonl go.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    lines = out_dir / "compiled.jsonl"
    found: dict[str, dict] = {}
    if lines.exists():
        found = {x["name"]: x for x in map(json.loads, lines.read_text().splitlines())}
    for name in (*cases, None):  # once more at the end, if nothing is left to compile
        if name is not None and name not in found:
            found[name] = compile_case(name)
            print(f"{name}: {found[name]['secs']:.0f} s", flush=True)
            with lines.open("a") as file:
                file.write(json.dumps(found[name]) + "\n")
            jax.clear_caches()
        write_report(out_dir, "compiled", format_tables(found), {"cases": list(found)})
    print_report(format_tables(found), {"cases": list(found)})


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
