"""Newest metrics of a run: against parsing every line, and reading only what was added."""

import json
import random

import pytest

from vlmae.runs import newest
from vlmae.runs.metric_writer import read_metrics
from vlmae.runs.newest import NewestMetrics
from vlmae.runs.result import last_step, last_values


def make_lines(count: int, seed: int = 0) -> list[str]:
    """Lines of training with two lists of names, values of all forms, evaluations now and then."""
    rng, lines = random.Random(seed), []
    forms = (rng.random(), 1e-12 * rng.random(), float(rng.randrange(9)), float("nan"), -3)
    for step in range(1, count + 1):
        names = ("loss/total", "speed/x", "mcm/asked_ratio" if step % 3 else "loss/e-1")
        line = {"step": step} | {name: rng.choice(forms) for name in names}
        lines.append(json.dumps(line) + "\n")
        if step % 7 == 0:
            lines.append(json.dumps({"step": step, "retrieval/t2v_r1": step}) + "\n")
    return lines


@pytest.mark.parametrize("seed", range(3))
def test_the_newest_values_are_those_of_all_lines(tmp_path, seed):
    path, reader, lines = tmp_path / "metrics.jsonl", NewestMetrics(tmp_path), make_lines(50, seed)
    assert reader.read() == (0, {})
    for start, end in ((0, 3), (3, 3), (3, 20), (20, len(lines))):
        with path.open("a") as file:
            file.writelines(lines[start:end])
        every = read_metrics(tmp_path)
        step, values = reader.read()
        assert step == last_step(every)
        assert json.dumps(values, sort_keys=True) == json.dumps(last_values(every), sort_keys=True)


def test_only_what_was_added_is_read_and_half_a_line_waits(tmp_path, monkeypatch):
    path, reader = tmp_path / "metrics.jsonl", NewestMetrics(tmp_path)
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert reader.read() == (1, {"a": 1.0})
    given = []
    monkeypatch.setattr(newest, "newest_values", lambda text, place: given.append(text) or {})
    with path.open("a") as file:
        file.write(": 5}\n")
    reader.read()
    assert given == [b'{"step": 2, "a": 5}\n']


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    """A run that continues removes lines after its checkpoint, by a new file."""
    path, reader = tmp_path / "metrics.jsonl", NewestMetrics(tmp_path)
    path.write_text('{"step": 8, "a": 1, "b": 2}\n')
    assert reader.read() == (8, {"a": 1.0, "b": 2.0})
    (tmp_path / "new").write_text('{"step": 4, "a": 3, "other": 3333333333333333333333}\n')
    (tmp_path / "new").replace(path)
    assert reader.read() == (4, {"a": 3.0, "other": 3333333333333333333333.0})


def test_lines_of_the_same_names_are_parsed_once(monkeypatch):
    parsed = []
    monkeypatch.setattr(newest, "parse_line", lambda line, _: parsed.append(line) or {"a": 1})
    newest.newest_values("".join(make_lines(700)).encode(), "metrics")
    assert len(parsed) < 20
