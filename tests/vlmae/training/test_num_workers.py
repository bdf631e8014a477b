"""The number of workers: how it follows from what is measured, and the command."""

import itertools
import re

import pytest
from helpers import random_batch

from vlmae.config.tree import override
from vlmae.training import num_workers as finding
from vlmae.training.num_workers import BATCHES, MADE_AHEAD, time_worker, workers_needed


@pytest.mark.parametrize(
    ("batch_secs", "step_secs", "workers"),
    [(1.0, 1.0, 2), (0.8, 1.0, 1), (0.001, 1.0, 1), (4.0, 0.5, 10), (4.1, 0.5, 11)],
)
def test_workers_keep_up_with_a_quarter_to_spare(batch_secs, step_secs, workers):
    assert workers_needed(batch_secs, step_secs) == workers


def test_batches_made_ahead_say_nothing_of_a_worker():
    clock = itertools.count(0, 2 * BATCHES)
    batches = [random_batch(2, seed=seed) for seed in range(MADE_AHEAD + BATCHES + 1)]
    secs, taken = time_worker(iter(batches), lambda: next(clock))
    assert secs == 2
    assert [id(batch) for batch in taken] == [id(batch) for batch in batches[MADE_AHEAD:-1]]


def test_the_command_prints_what_follows_from_its_measurements(run_tiny, monkeypatch):
    lines = []
    monkeypatch.setattr(finding, "print", lines.append, False)
    code, err, workdir = run_tiny("--find-num-workers", "--objectives.vtm", "0")
    assert (code, err) == (0, "")
    assert not workdir.exists()
    step_secs, batch_secs = map(float, re.findall(r"[\d.e-]+(?= s)", lines[0]))
    found = int(lines[-1].removeprefix("to keep up, with 25% to spare: --data.num-workers "))
    assert abs(found - workers_needed(batch_secs, step_secs)) <= 1  # what is printed is rounded


def test_of_several_phases_the_fastest_counts(run_tiny, monkeypatch):
    thinned = {"stages": "0", "keep-rate": "0.75", "warmup-rates": "0.5", "warmup-steps": "4"}
    flags = [
        word
        for name, value in thinned.items()
        for word in (f"--model.video.sparsify.{name}", value)
    ]
    timed = []

    def time_steps(config, batches) -> float:
        timed.append(config.model.video.sparsify.keep_rate)
        return 1.0

    monkeypatch.setattr(finding, "time_steps", time_steps)
    code, err, _ = run_tiny("--find-num-workers", *flags)
    assert (code, err) == (0, "")
    assert timed == [0.5]


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_decoded(tiny_config):
    def batches():
        raise AssertionError
        yield

    with pytest.raises(ValueError, match="leaves 1 row on each device"):
        finding.find_num_workers(override(tiny_config, {"data.batch_size": 1}), batches())


def test_not_with_flags_of_something_else(run_tiny):
    code, err, _ = run_tiny("--find-num-workers", "--find-batch-size")
    assert code == 1 and "not with --find-num-workers" in err
    code, err, _ = run_tiny("--find-num-workers", "--sweep", "seed")
    assert code == 1 and "--find-num-workers tries one config" in err
