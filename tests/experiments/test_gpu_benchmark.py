"""The benchmark for one GPU: its parts keep their limits, and its tables show what there is."""

import json
import os
import sys
import time

import pytest

from experiments.benchmarks import compiled, gpu
from experiments.benchmarks.gpu import Part, parts_of, quickstart_rows, run_part, step_rows


@pytest.mark.parametrize("call", ["first", "second"])
def test_a_call_takes_less_than_ten_minutes(call, tmp_path):
    parts = parts_of(call, tmp_path, tiny=False)
    assert sum(part.limit_secs for part in parts) < 600
    for part in parts:  # those that know their budget end by themselves before they are ended
        budget = dict(zip(part.command, part.command[1:], strict=False)).get("--budget")
        assert budget is None or float(budget) < part.limit_secs


def test_a_part_that_hangs_ends_with_all_that_it_started(tmp_path):
    code = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True)"
    )
    part = Part("hangs", 2, (sys.executable, "-c", f"{code}; time.sleep(60)"))
    start = time.monotonic()
    assert run_part(part, tmp_path)["ended"] == "out of time"
    assert time.monotonic() - start < 20
    child = int((tmp_path / "hangs.log").read_text().splitlines()[-1])
    state = "gone"
    for _ in range(50):  # until init has taken it over and reaped it
        try:
            with open(f"/proc/{child}/stat") as file:
                state = file.read().split()[2]
        except FileNotFoundError:
            state = "gone"
        if state in ("gone", "Z"):
            break
        time.sleep(0.1)
    assert state in ("gone", "Z")


def test_a_part_that_fails_says_so_and_the_next_one_runs(tmp_path, monkeypatch):
    parts = [Part(name, 20, (sys.executable, "-c", f"exit({n})")) for n, name in enumerate("ab")]
    monkeypatch.setattr(gpu, "parts_of", lambda *_: parts[::-1])
    gpu.main("first", tmp_path)
    ended = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert [(x["part"], x["ended"]) for x in ended] == [("b", 1), ("a", 0)]
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"] == ended


def write(path, *lines: dict) -> None:
    os.makedirs(path.parent, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_losses_of_the_three_forms_are_compared(tmp_path):
    for form, loss in zip(
        ("bfloat16_cudnn", "bfloat16_xla", "float32_xla"), (3.1, 4, 3), strict=True
    ):
        metrics = {"loss/total": loss, "speed/clips_per_sec": 10.0}
        write(tmp_path / f"quickstart_{form}" / "metrics.jsonl", {"loss/total": 9.0}, metrics)
    assert [row[-1] for row in quickstart_rows(tmp_path)[1:]] == ["yes", "no", "yes"]
    (tmp_path / "quickstart_float32_xla" / "metrics.jsonl").unlink()
    assert [row[-1] for row in quickstart_rows(tmp_path)[1:]] == ["-", "-", "-"]


def test_our_step_is_compared_with_the_fastest_of_the_peer(tmp_path):
    line = "B,4,dense,64"
    write(tmp_path / "machine.jsonl", {"python": "3.12"}, {"product_tflops": 500.0})
    own = {"line": line, "ms": 100.0, "ms_range": [90, 110], "peak_gib": 20.0, "tflops": 200.0}
    write(tmp_path / "ours.jsonl", own, {"line": "B,4,SMAUG,64", "error": "no time left"})
    peers = [
        {"line": line, "form": form, "ms": ms, "ms_range": [ms - 10, ms + 10], "peak_gib": 30.0}
        for form, ms in (("compiled", 150.0), ("graphs", 120.0), ("eager", 200.0))
    ]
    write(tmp_path / "peer.jsonl", *peers, {"line": line, "form": "tuned", "error": "OOM"})
    [_, row] = step_rows(tmp_path)
    expected = ["B/16, 4 frames, dense", "64", "100.0", "120.0 (graphs)", "1.20 (1.00-1.44)"]
    assert row == [*expected, "20.00", "30.00", "40%"]


def test_compiled_steps_are_kept_and_their_largest_batch_is_on_a_line(tmp_path, monkeypatch):
    made = []

    def compile_case(name: str) -> dict:
        made.append(name)
        case = compiled.CASES[name]
        memory = {"state": 2**31, "batch": 0, "temporary": case.clips * 2**28, "results": 0}
        figures = {"flops": 10**13, "least_ms": 20.0, "calls": {"f": 3}, "collectives": []}
        total = sum(memory.values())
        return figures | {
            "name": name,
            "batch": case.clips,
            "memory": memory,
            "total": total,
            "secs": 1,
        }

    monkeypatch.setattr(compiled, "compile_case", compile_case)
    for _ in range(2):
        compiled.main(("dense", "dense 128", "smaug"), tmp_path)
    assert made == ["dense", "dense 128", "smaug"]
    text = (tmp_path / "compiled.md").read_text()
    assert "| dense, all four objectives | 8.00 | 1.00 | 10.00 | 10.0 | 20.0 | 1.00 | 3 |" in text
    # 2 GiB and a quarter GiB a clip, in 0.9 of 47.5 and 79.1 GiB
    assert "| dense, all four objectives | 0.250 | 163 | 276 |" in text
