"""Cost to reach a quality, by runs whose quality is a known function of their cost."""

import dataclasses
import json
import math

import pytest

from data_pipelines.schema.checks import UserError
from vlmae.figures import cost_to_reach
from vlmae.figures.cost_to_reach import cost_at, reach_all, rows_by_seed, write_reach
from vlmae.runs.result import Cost
from vlmae.runs.summary import COMPLETE, UNFINISHED, Run

RANK = "retrieval/t2v_mean_log_rank"


def a_run(title: str, seed: int, steps: int, flops: float, value: float, **changes) -> Run:
    fields = {"seed": seed, "optim.schedule": "wsd", "optim.decay_share": 0.2}
    run = Run(
        name=f"{title}/{seed}/{steps}",
        title=title,
        fields=fields,
        state=COMPLETE,
        error="",
        step=steps,
        steps=steps,
        metrics={RANK: value},
        cost=Cost(flops, 1.0, flops * steps, 2.0 * flops * steps),
    )
    return dataclasses.replace(run, **changes)


def by_law(title: str, seed: int, flops: float, lengths=(100, 200, 400)) -> list[Run]:
    """Runs whose mean log rank falls by 0.5 with each doubling of the steps."""
    return [a_run(title, seed, n, flops, 3.0 + seed - 0.5 * math.log2(n / 100)) for n in lengths]


@pytest.mark.parametrize(
    ("target", "lower_is_better", "values", "expected"),
    [
        (2.0, True, [3.0, 2.0, 1.0], 20.0),
        (1.5, True, [3.0, 2.0, 1.0], 20 * math.sqrt(2)),  # half a doubling
        (2.5, False, [1.0, 2.0, 3.0], 20 * math.sqrt(2)),
        (3.5, True, [3.0, 2.0, 1.0], 10.0),  # the first is good enough
        (0.5, True, [3.0, 2.0, 1.0], None),
        (2.0, True, [3.0, 1.5, 2.5], 10 * 2 ** (2 / 3)),  # where it is first reached
    ],
)
def test_cost_at_a_quality(target, lower_is_better, values, expected):
    found = cost_at(target, [10.0, 20.0, 40.0], values, lower_is_better)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_ratios_follow_from_the_law_and_are_paired_by_seed():
    """Equal quality at equal steps, so the ratio is that of the cost of a step."""
    runs = [run for seed in (0, 1) for run in by_law("dense", seed, 8.0)]
    runs += [run for seed in (0, 1, 2) for run in by_law("masked", seed, 2.0, (100, 400, 1600))]
    runs += by_law("never", 0, 1.0, (100, 200))
    curves = cost_to_reach.decayed_curves(runs)
    reached = reach_all(curves, "dense", {"rank": (RANK,)})
    found = {(r.method, r.seed): (r.operations, r.seconds) for r in reached}
    assert found.keys() == {("dense", 0), ("dense", 1), ("masked", 0), ("masked", 1), ("never", 0)}
    assert found["masked", 0] == found["masked", 1] == (pytest.approx(4), pytest.approx(4))
    assert found["dense", 0] == (pytest.approx(1), pytest.approx(1))
    assert found["never", 0] == (None, None)
    rows = {(row["method"], row["seed"]): row for row in rows_by_seed(reached)}
    assert rows["never", 0]["cost_ratio_seconds"] is None
    assert rows["masked", 1]["cost_ratio_operations"] == pytest.approx(4)


def test_trunks_and_unfinished_runs_are_no_points_of_a_curve():
    trunk = a_run("dense", 0, 800, 8.0, 0.0)
    trunk.fields["optim.decay_share"] = 0.0
    unfinished = a_run("dense", 0, 900, 8.0, 0.0, state=UNFINISHED)
    curves = cost_to_reach.decayed_curves([trunk, unfinished, *by_law("dense", 0, 8.0)])
    assert [run.steps for run in curves["dense"][0]] == [100, 200, 400]


def test_what_cannot_be_compared_is_refused(tmp_path):
    runs = by_law("dense", 0, 8.0)
    with pytest.raises(UserError, match="no complete run has that --name; there is: dense"):
        write_reach(runs, "sparse", (RANK,), tmp_path)
    with pytest.raises(UserError, match="has no retrieval/v2t_mean_log_rank"):
        write_reach(runs, "dense", (), tmp_path)
    with pytest.raises(UserError, match=r"the same --name, --seed and --train\.steps"):
        write_reach([*runs, a_run("dense", 0, 200, 4.0, 1.0)], "dense", (RANK,), tmp_path)


def test_files(tmp_path):
    runs = [*by_law("dense", 0, 8.0), *by_law("masked", 0, 2.0), *by_law("never", 0, 1.0, (100,))]
    assert write_reach(runs, "dense", (RANK,), tmp_path) == [
        "cost_to_reach.md",
        "cost_to_reach.json",
        "cost_to_reach.png",
    ]
    rows = json.loads((tmp_path / "cost_to_reach.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "masked", "never"]
    assert rows[1] == {
        "method": "masked",
        "seed": 0,
        "cost_ratio_operations": pytest.approx(4),
        "cost_ratio_seconds": pytest.approx(4),
    }
    table = (tmp_path / "cost_to_reach.md").read_text()
    assert "| masked | 1 | 4.0 | 4.0 |" in table and "| never | 1 | not reached |" in table
    assert (tmp_path / "cost_to_reach.png").stat().st_size > 10_000
