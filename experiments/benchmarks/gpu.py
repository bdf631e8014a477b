"""All that one GPU can say, in two calls of less than ten minutes each.

    python -m experiments.benchmarks.gpu first --out runs/gpu
    python -m experiments.benchmarks.gpu second --out runs/gpu

Every part is a process of its own with a limit of its own; it writes as it goes, and none stops the
next one. The first call: versions and measured rates; quickstart in three forms, whose losses must
agree; cuDNN's attention against XLA's; whether both sides of the step benchmark compute the same
loss. The second call: our step and PyTorch's for every variant; the largest batch that fits, beside
what the compiler said; a profile. `--tiny` tries everything with tiny sizes, on a CPU too.
`docs/guide/gpu.md` has the recipe for a machine that nobody may install on.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import tyro

from experiments.benchmarks.report import format_ratio, write_report
from vlmae.runs.tables import markdown_table

ROOT = Path(__file__).parents[2]
LOSS_TOLERANCE = 0.05  # of quickstart's last loss between number types, relative
FORMS = {
    "bfloat16, cuDNN": ("bfloat16", "cudnn"),
    "bfloat16, XLA": ("bfloat16", "xla"),
    "float32, XLA": ("float32", "xla"),
}
# Size, frames, variant, clips of a step; the most telling first, since time may run out.
LINES = (
    "B,4,SMAUG,64", "B,4,dense,64", "B,4,masked,64", "B,4,MuLTI,32",
    "S,4,SMAUG,128", "S,4,dense,128", "S,4,masked,128", "S,4,MuLTI,64",
)  # fmt: skip


class Part(NamedTuple):
    """A process of the benchmark."""

    name: str
    limit_secs: float
    command: tuple[str, ...]
    env: Mapping[str, str] = MappingProxyType({})


def sides(task: str, budget: float, out: Path, *more: str) -> tuple[str, ...]:
    """Return the command of a task of `gpu_sides`."""
    where = ("--budget", str(budget), "--out", str(out))
    return (sys.executable, "-m", "experiments.benchmarks.gpu_sides", task, *where, *more)


def quickstart(out: Path, form: str, tiny: bool) -> Part:
    """Train quickstart in one of `FORMS`, from making the data to evaluating."""
    dtype, kernel = FORMS[form]
    steps, name = ("4" if tiny else "60"), f"quickstart_{dtype}_{kernel}"
    flags = ["--train.steps", steps, "--train.log-every-steps", str(int(steps) // 2)]
    flags += ["--optim.warmup-steps", str(int(steps) // 4), "--data.num-workers", "4"]
    flags += ["--model.dtype", dtype, "--workdir", str(out / name)]
    flags += ["--data.data-dir", str(out / "data")]
    # One objective compiles several times faster than all; a CPU has no cuDNN.
    only_vtc = [x for name in ("vtm", "mlm", "mvm") for x in (f"--objectives.{name}", "0")]
    flags += only_vtc if tiny else ["--model.attention", kernel]
    command = (sys.executable, str(ROOT / "experiments" / "quickstart.py"), *flags)
    return Part(name, 500 if tiny else 75, command)


def parts_of(call: str, out: Path, tiny: bool) -> list[Part]:
    """List the parts of a call; their limits add up to less than ten minutes, unless tiny."""
    extra = ("--tiny",) if tiny else ()
    slower = 4 if tiny else 1  # a CPU compiles for longer than a GPU machine
    # Otherwise each product is tried in tens of Triton kernels, minutes for a program.
    untuned = {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"} if not tiny else {}

    def task(name: str, limit_secs: float, *more: str, **env: str) -> Part:
        limit = slower * limit_secs
        return Part(name, limit, sides(name, limit - 10, out, *more, *extra), env)

    if call == "first":
        pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
        tests = str(ROOT / "tests" / "vlmae" / "models" / "test_attention.py")
        return [
            task("machine", 60),
            *(quickstart(out, form, tiny) for form in FORMS),
            Part("attention", slower * 90, (*pytest, tests)),
            task("equal", 150, **untuned),
        ]
    lines = ("--lines", *(LINES[:2] if tiny else LINES))
    forms = ("--forms", *(("eager",) if tiny else ("compiled", "graphs", "eager")))
    return [
        task("ours", 200, *lines, **untuned),
        task("peer", 240, *lines, *forms),
        task("largest", 120, **untuned),
    ]


def run_part(part: Part, out: Path) -> dict[str, Any]:
    """Run a part; its output goes to NAME.log, and everything that it started ends with it."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(out / "jax_cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(out / "inductor_cache"),
        **part.env,
    }
    start = time.monotonic()
    with (out / f"{part.name}.log").open("w") as log:
        log.write(f"$ {shlex.join(part.command)}\n")
        log.flush()
        process = subprocess.Popen(
            part.command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | str = process.wait(part.limit_secs)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # workers and compilers too: own session
            process.wait()
            code = "out of time"
    return {"part": part.name, "secs": round(time.monotonic() - start, 1), "ended": code}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def quickstart_rows(out: Path) -> list[list[str]]:
    """Compare quickstart's last loss and recall in all forms that came to an end."""
    rows = [["quickstart", "last loss", "text to video R@1", "clips/s", "agrees"]]
    found = {}
    for form, (dtype, kernel) in FORMS.items():
        lines = read_lines(out / f"quickstart_{dtype}_{kernel}" / "metrics.jsonl")
        found[form] = {key: value for line in lines for key, value in line.items()}
    reference = found["float32, XLA"].get("loss/total")
    for form, metrics in found.items():
        loss = metrics.get("loss/total")
        known = loss is not None and reference is not None
        agrees = known and abs(loss - reference) <= LOSS_TOLERANCE * abs(reference)
        recall = next((v for k, v in metrics.items() if k.endswith("t2v_r1")), None)
        cells = (loss, recall, metrics.get("speed/clips_per_sec"))
        shown = ["-" if x is None else f"{x:.4g}" for x in cells]
        rows.append([form, *shown, {True: "yes", False: "no"}[agrees] if known else "-"])
    return rows


def step_rows(out: Path) -> list[list[str]]:
    """Compare our step with the best form of PyTorch's."""
    head = ["step", "clips", "ours, ms", "PyTorch, ms", "x (range)", "GiB, ours", "PyTorch"]
    rows = [[*head, "share of the measured product rate"]]
    machine = {k: v for line in read_lines(out / "machine.jsonl") for k, v in line.items()}
    peers: dict[str, list[dict]] = {}
    for found in read_lines(out / "peer.jsonl"):
        if "ms" in found:
            peers.setdefault(found["line"], []).append(found)
    for found in read_lines(out / "ours.jsonl"):
        if "ms" not in found:
            continue
        size, frames, variant, clips = found["line"].split(",")[:4]
        best = min(peers.get(found["line"], []), key=lambda peer: peer["ms"], default=None)
        low, high = found["ms_range"]
        ratio = "-"
        if best:
            ratio = format_ratio(
                {
                    "ratio": best["ms"] / found["ms"],
                    "ratio_range": [best["ms_range"][0] / high, best["ms_range"][1] / low],
                }
            )
        rate = machine.get("product_tflops")
        rows.append(
            [
                f"{size}/16, {frames} frames, {variant}",
                clips,
                f"{found['ms']:.1f}",
                f"{best['ms']:.1f} ({best['form']})" if best else "-",
                ratio,
                f"{found['peak_gib']:.2f}",
                f"{best['peak_gib']:.2f}" if best else "-",
                f"{found['tflops'] / rate:.0%}" if rate else "-",
            ]
        )
    return rows


def largest_rows(out: Path) -> list[list[str]]:
    """Say which batches fit, beside the memory that the compiler said."""
    rows = [["largest batch", "clips", "the compiler said, GiB", "peak, GiB", "fits"]]
    return rows + [
        [x["line"], str(x["clips"]), f"{x['needed_gib']:.2f}", f"{x['peak_gib']:.2f}", x["fits"]]
        for x in read_lines(out / "largest.jsonl")
        if "clips" in x
    ]


def main(
    call: tyro.conf.Positional[Literal["first", "second"]],
    out: Path = Path("runs/gpu"),
    tiny: bool = False,
) -> None:
    """Run a call, and write gpu.md and gpu.json of all that is known by then.

    Args:
      call: first or second; each takes less than ten minutes.
      out: the folder of both calls.
      tiny: tiny sizes, to try it.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for part in parts_of(call, out, tiny):
        ended = run_part(part, out)
        print(json.dumps(ended), flush=True)
        with (out / "parts.jsonl").open("a") as file:
            file.write(json.dumps(ended) + "\n")
        tables = (quickstart_rows(out), step_rows(out), largest_rows(out))
        text = "\n\n".join(markdown_table(rows) for rows in tables if len(rows) > 1)
        content = {x: read_lines(out / f"{x}.jsonl") for x in ("machine", "equal", "parts")}
        write_report(out, "gpu", text, {"tiny": tiny, "tolerance": LOSS_TOLERANCE}, **content)
    print((out / "gpu.md").read_text())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
