"""The memory benchmark: every setting makes a config, and shares are of the first line."""

import json

import pytest

from experiments.benchmarks import memory
from experiments.benchmarks.sides import variant_config
from vlmae.config.tree import flatten, override

GIB = {"all is kept": 2.0, "`--model.remat full`": 1.5, "PyTorch": 3.0}


class FakeProcess:
    """Stands for the process of a side; `calls` are those of the last one."""

    calls: list

    def __init__(self, side: type, *arguments: object):
        FakeProcess.calls = []
        self.bytes = 2**30 * (3 if side is memory.PeerSide else 1)

    def __enter__(self):
        return self

    def __exit__(self, *_: object):
        self.calls.append("closed")

    def call(self, method: str) -> int | None:
        self.calls.append(method)
        return self.bytes if method == "peak_bytes" else None


def test_table():
    assert memory.format_table(GIB).splitlines()[2:] == [
        "| all is kept | 2.00 | 1.00 |",
        "| `--model.remat full` | 1.50 | 0.75 |",
        "| PyTorch | 3.00 | 1.50 |",
    ]


def test_a_step_warms_up_before_memory_is_measured():
    assert memory.measure(FakeProcess(memory.PeerSide)) == 3.0
    assert FakeProcess.calls == ["step", "peak_bytes", "closed"]


@pytest.mark.parametrize("name", memory.SETTINGS)
def test_a_line_is_the_flag_that_it_names(name):
    base, changes = variant_config("S", 4, "SMAUG", 4), memory.SETTINGS[name]
    changed = flatten(override(base, changes)).items() - flatten(base).items()
    assert dict(changed) == changes
    for field in changes:
        assert field.rpartition(".")[2].replace("_", "-") in name or name.startswith("`full`")


def test_all_lines_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "OwnProcess", FakeProcess)
    memory.main(out_dir=tmp_path)
    gib = json.loads((tmp_path / "memory.json").read_text())["gib"]
    assert list(gib) == [*memory.SETTINGS, "PyTorch", "PyTorch, compiled"]
    assert set(gib.values()) == {1.0, 3.0}
