"""`--profile`: what is traced, and that the run does not notice."""

import contextlib
from pathlib import Path

import jax
import pytest
from helpers import random_batch
from run_checks import history

from data_pipelines.schema.records import Batch
from vlmae.training.compiled_step import TRACED_STEPS, WARMUP_STEPS, CompiledStep, Trace, TracedStep

QUICK = ["--objectives.vtm", "0", "--objectives.mlm", "0", "--objectives.mvm", "0"]


BATCHES = {"a": random_batch(2, frames=1), "b": random_batch(2, frames=2)}


class FakeStep(CompiledStep):
    """Notes what happens when, in place of compiling and running."""

    def __init__(self, events: list[str]):
        super().__init__(step=print)
        self.events = events

    def name(self, batch: Batch) -> str:
        return "ab"[batch.video.shape[1] - 1]

    def compile(self, state, batch: Batch) -> None:
        if not self.is_compiled(batch):
            self.events.append(f"compile {self.name(batch)}")
        self.programs[batch.video.shape] = None

    def __call__(self, state, batch: Batch) -> tuple:
        self.events.append(self.name(batch))
        return state, {}


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What happened, with "start" and "stop" of the trace."""
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


def play(events: list[str], names: list[str]) -> list[str]:
    """Runs steps on batches "a" and "b", and "eval" in between; returns what the trace says."""
    said = []
    with Trace(Path("there"), said.append, contextlib.nullcontext) as trace:
        step = TracedStep(FakeStep(events), trace)
        evaluate = trace.around(lambda: events.append("eval"))
        for name in names:
            if name == "eval":
                evaluate()
            else:
                step.compile(None, BATCHES[name])
                step(None, BATCHES[name])
    return said


def test_a_few_steps_are_traced_once_after_a_warm_up(events):
    said = play(events, ["a"] * 12)
    warm, traced = ["a"] * WARMUP_STEPS, ["a"] * TRACED_STEPS
    rest = ["a"] * (12 - WARMUP_STEPS - TRACED_STEPS)
    assert events == ["compile a", *warm, "start", *traced, "stop", *rest]
    assert len(said) == 1 and "traced 3 step(s) into there" in said[0]


def test_what_is_compiled_or_evaluated_later_ends_the_trace(events):
    said = play(events, ["a", "a", "a", "a", "b", "b"])
    assert events == ["compile a", *"aaa", "start", "a", "stop", "compile b", *"bb"]
    assert "traced 1 step(s)" in said[0]
    events.clear()
    play(events, ["a", "a", "a", "a", "a", "eval"])
    assert events == ["compile a", *"aaa", "start", *"aa", "stop", "eval"]


def test_the_warm_up_begins_anew_after_anything_else(events):
    play(events, ["a", "a", "b", "a", "eval", "b", "a", "b", "a"])
    assert events[-3:] == ["start", "a", "stop"]
    assert events.count("start") == 1


def test_steps_are_waited_for_outside_of_pauses(events, monkeypatch):
    """Time in which a device computes is the run's; only what writes the trace is not."""

    @contextlib.contextmanager
    def paused():
        events.append("pause")
        yield
        events.append("go on")

    monkeypatch.setattr(jax, "block_until_ready", lambda last: events.append("wait"))
    with Trace(Path("there"), print, paused) as trace:
        step = TracedStep(FakeStep(events), trace)
        for name in "aaaa":
            step.compile(None, BATCHES[name])
            step(None, BATCHES[name])
    traced = ["wait", "pause", "start", "go on", "a", "wait", "pause", "stop", "go on"]
    assert events == ["compile a", *"aaa", *traced]


def test_a_run_too_short_for_a_trace_says_so(events):
    said = play(events, ["a"] * WARMUP_STEPS)
    assert "start" not in events
    assert said == [
        "no trace was written: that takes more than 3 steps between which nothing is compiled or "
        "evaluated"
    ]


def test_a_run_with_a_trace_is_the_run_without(run_tiny, tmp_path):
    """And goes on without the flag: that one belongs to the command, not to the run."""
    code, err, traced = run_tiny(*QUICK, "--profile", workdir=tmp_path / "traced")
    assert code == 0, err
    files = list((traced / "profile").rglob("*.xplane.pb"))
    assert len(files) == 1 and files[0].stat().st_size > 1000
    code, err, plain = run_tiny(*QUICK, workdir=tmp_path / "plain")
    assert code == 0, err
    assert not (plain / "profile").exists()
    assert len(history(traced)) >= 8
    assert history(traced) == history(plain)
    code, err, _ = run_tiny(*QUICK, "--train.steps", "9", workdir=traced)
    assert code == 0, err
