"""MuLTI's study: equal operations, and differences paired by seed."""

import dataclasses
from pathlib import Path

import pytest

from experiments.offline import multi_claims
from vlmae.runs.result import Cost
from vlmae.runs.summary import COMPLETE, UNFINISHED, Run


def test_every_method_gets_the_operations_of_the_reference(monkeypatch, tmp_path):
    flops = {"multi": 3.0, "resampler": 2.9, "own_attention": 3.0, "no_mcm": 1.0}
    of_title = {f"multi_claims_{name}": value for name, value in flops.items()}
    monkeypatch.setattr(multi_claims, "flops_per_clip", lambda config: of_title[config.name])
    listed = []
    monkeypatch.setattr(
        multi_claims.claims, "run_missing", lambda script, commands: listed.extend(commands)
    )
    multi_claims.study(tmp_path, seeds=(0, 1), steps=100)
    assert len(listed) == 2 * len(flops)
    for name, *flags in listed:
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        assert int(given["--train.steps"]) * flops[name] == pytest.approx(300, rel=0.01)
        assert Path(given["--workdir"]) == tmp_path / name / f"seed_{given['--seed']}"


def made_run(seed: int, log_rank: float, mcm: float | None) -> Run:
    metrics = {f"retrieval/{way}_{key}": log_rank for way in ("t2v", "v2t") for key in KEYS}
    metrics["multiple_choice/match_nll"] = 1.0
    if mcm is not None:
        metrics["multiple_choice/mcm_nll"] = mcm
    cost = Cost(*(0.0 for _ in Cost._fields))
    return Run("", "", {"seed": seed}, COMPLETE, "", 5, 5, metrics, cost)


KEYS = ("mean_log_rank", "info_nce")


def test_differences_are_those_of_one_seed():
    """Seed 1 is harder for both; the method is worse in each by 0.1 to 0.3."""
    found = {
        "multi": {0: made_run(0, 1.0, 0.5), 1: made_run(1, 2.0, 0.7), 2: made_run(2, 1.5, 0.6)},
        "resampler": {0: made_run(0, 1.1, 0.4), 1: made_run(1, 2.3, 0.8)},
        "no_mcm": {1: made_run(1, 2.0, None)},
        "own_attention": {},
    }
    head, reference, resampler, no_mcm = multi_claims.compare(found)
    assert head[3:] == list(multi_claims.QUALITIES)
    assert reference == ["multi", "3", "5", "1.500", "1.500", "1.000", "0.600"]
    worse = "+0.200 (+0.100 to +0.300), worse"
    assert resampler[:5] == ["resampler", "2", "5", worse, worse]
    assert resampler[6].endswith("(-0.100 to +0.100), undecided")
    assert no_mcm[1] == "1" and no_mcm[6] == ""


def test_runs_that_are_not_complete_are_named(monkeypatch, tmp_path, capsys):
    """Such a run has metrics of training alone."""
    done = dataclasses.replace(made_run(0, 1.0, 0.5), title="multi_claims_multi")
    running = dataclasses.replace(
        done,
        name="resampler/seed_0",
        title="multi_claims_resampler",
        state=UNFINISHED,
        metrics={"loss/total": 2.0},
    )
    monkeypatch.setattr(multi_claims, "find_runs", lambda _: [done, running])
    multi_claims.report(tmp_path)
    said = capsys.readouterr().out
    assert "| multi | 1 |" in said and "| resampler |" not in said
    assert said.endswith("\nleft out, not complete: resampler/seed_0\n")
    assert (tmp_path / "table.md").read_text() in said
