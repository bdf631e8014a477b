"""Metrics: each step stands once in the file."""

import dataclasses
import json
import sys
import types

import pytest
import tiny_experiment

from vlmae.config.tree import override
from vlmae.runs.metric_writer import MetricWriter, drop_later_lines, open_log, read_metrics


def test_later_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss/total": 0.5}) for step in (10, 20, 30)]
    path.write_text("\n".join(lines) + "\n" + '{"step": 2')
    drop_later_lines(path, 20)
    assert [line["step"] for line in read_metrics(path.parent)] == [10, 20]


def test_old_names_are_read_as_todays(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mcm/asked_ratio": 0.5, "loss/mcm": 2}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "mcm/valid_ratio": 0.5, "loss/mcm": 2}]


def test_a_continued_run_writes_each_step_once(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = MetricWriter(tmp_path, start)
        for step in steps:
            writer.write(step, {"loss/total": float(step)})
        writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert list((tmp_path / "tensorboard").glob("events.*"))


PROJECT = override(tiny_experiment.get_config(), {"train.wandb_project": "videos"})


class FakeWandb(types.ModuleType):
    """As much of wandb as is used; remembers all calls."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished, self.refusal = [], [], 0, ""
        self.errors = types.SimpleNamespace(Error=RuntimeError)

    def init(self, **options):
        if self.refusal:
            raise self.errors.Error(self.refusal)
        self.inits.append(options)
        return self

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_goes_on_with_the_same_run(wandb, tmp_path):
    for start, steps in ((0, (1, 2)), (1, (2, 3))):
        writer = MetricWriter(tmp_path, start, open_log(PROJECT, tmp_path))
        for step in steps:
            writer.write(step, {"loss/total": float(step)})
        writer.close()
    first, second = wandb.inits
    assert first == second and first["project"] == "videos" and first["resume"] == "allow"
    assert first["name"] == tmp_path.name and first["dir"] == str(tmp_path)
    assert first["config"] == dataclasses.asdict(PROJECT)
    assert [step for step, _ in wandb.logged] == [1, 2, 2, 3] and wandb.finished == 2
    assert wandb.logged[-1] == (3, {"loss/total": 3.0})
    other = tmp_path / "other"
    other.mkdir()
    open_log(PROJECT, other)
    assert wandb.inits[-1]["id"] != first["id"]


def test_wandb_only_where_it_is_asked_for(wandb, tmp_path):
    assert open_log(tiny_experiment.get_config(), tmp_path) is None
    assert wandb.inits == [] and list(tmp_path.iterdir()) == []


def test_wandb_refuses(wandb, tmp_path):
    wandb.refusal = "api_key not configured\n  call wandb login"
    with pytest.raises(ValueError, match=r"^train\.wandb_project: api_key not configured call"):
        open_log(PROJECT, tmp_path)


@pytest.mark.e2e
def test_wandb_is_asked_for_but_not_installed(run_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, err, _ = run_tiny("--train.wandb-project", "videos")
    assert code == 1 and err.splitlines()[-1] == (
        "error: train.wandb_project is set, but wandb is not installed: pip install 'vlmae[wandb]'"
    )
