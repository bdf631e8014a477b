"""The report says what stands in the work directories: compared with numbers made by hand."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_experiment
from matplotlib.figure import Figure
from PIL import Image

from vlmae.cli.main import main
from vlmae.config.tree import override
from vlmae.figures.sweep_plots import chance_levels, group_labels, numeric_fields
from vlmae.figures.sweep_report import format_number, heading, report
from vlmae.runs.result import training_cost, write_result
from vlmae.runs.summary import (
    COMPLETE,
    DAMAGED,
    FAILED,
    UNFINISHED,
    Group,
    find_runs,
    group_by_seed,
    pareto_front,
    value_of,
)
from vlmae.runs.workdir import write_run_metadata

RATIO = "model.video.mask.ratio"


def make_run(
    workdir: Path, changes: dict, steps: list[int], final: dict[str, float] | None, flops=2e9
) -> None:
    """A work directory as training leaves it: lines at these steps and, if complete, a result.

    The clip rate of the i-th line is 100, 50, 25, ...; batches have 8 clips.
    """
    write_run_metadata(override(tiny_experiment.get_config(), changes), workdir)
    lines = []
    for i, step in enumerate(steps):
        rate = 100 / 2**i
        speed = {"speed/clips_per_sec": rate, "speed/secs_per_step": 8 / rate}
        lines.append({"step": step, "loss/total": 9.0 - i, "speed/flops_per_clip": flops, **speed})
    if final is not None:
        final = {f"retrieval/{name}": value for name, value in final.items()}
        lines.append({"step": steps[-1], **final})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if final is not None:
        write_result(workdir, steps[-1], final, 8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two ratios, two seeds of the first; an unfinished run, and two that failed."""
    chance = {"t2v_chance_r1": 8.3}
    root = tmp_path / "runs"
    make_run(root / "a", {RATIO: 0.5, "seed": 0}, [2, 4, 8], {"t2v_r1": 40.0, **chance})
    make_run(root / "b", {RATIO: 0.5, "seed": 1}, [2, 4, 8], {"t2v_r1": 46.0, **chance})
    make_run(root / "c", {RATIO: 0.75}, [2, 4, 8], {"t2v_r1": 30.0, **chance}, flops=1e9)
    make_run(root / "deep" / "d", {RATIO: 0.9}, [2, 4], None)
    with (root / "deep" / "d" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss/to')  # cut by a kill
    make_run(root / "e", {RATIO: 0.9, "seed": 1}, [2], None)
    (root / "e" / "error.txt").write_text(
        "Traceback ...\nvlmae.training.train_log.NonFiniteLoss: step 3\n"
    )
    (root / "f").mkdir()
    (root / "f" / "error.txt").write_text("ValueError: a | b\n")
    return root


def test_what_is_found_and_its_state(folder):
    (folder / "a" / "tokenizer").mkdir()
    (folder / "a" / "tokenizer" / "config.json").write_text("{}")
    runs = {run.name: run for run in find_runs(folder)}
    assert [run.state for run in runs.values()] == [
        *[COMPLETE, COMPLETE, COMPLETE, UNFINISHED, FAILED, FAILED],
    ]
    assert list(runs) == ["a", "b", "c", "deep/d", "e", "f"]
    assert [run.step for run in runs.values()] == [8, 8, 8, 4, 2, 0]
    assert runs["e"].error == "NonFiniteLoss: step 3"
    assert runs["deep/d"].metrics["loss/total"] == 8.0


def test_a_run_without_metrics_is_unfinished(tmp_path):
    write_run_metadata(tiny_experiment.get_config(), tmp_path)
    [run] = find_runs(tmp_path)
    assert (run.name, run.state, run.step) == (tmp_path.name, UNFINISHED, 0)
    assert math.isnan(run.cost.secs_per_clip)


def test_a_config_that_cannot_be_read_is_a_damaged_run(folder):
    (folder / "a" / "config.json").write_text('{"sede": 1}')
    run = find_runs(folder)[0]
    assert run.state == DAMAGED and "config.json: unknown field sede" in run.error


def test_a_result_of_another_config_does_not_count(folder):
    write_run_metadata(override(tiny_experiment.get_config(), {"train.steps": 20}), folder / "c")
    run = next(run for run in find_runs(folder) if run.name == "c")
    assert (run.state, run.step, run.steps) == (UNFINISHED, 8, 20)


def test_cost():
    """A line speaks for the steps since the last one: 10, 10 and 20 of them."""
    lines = [
        {"step": s, "speed/clips_per_sec": c, "speed/secs_per_step": t, "speed/flops_per_clip": f}
        for s, c, t, f in [(10, 4.0, 2.0, 100.0), (20, 8.0, 1.0, 200.0), (40, 2.0, 4.0, 300.0)]
    ]
    cost = training_cost([*lines, {"step": 40, "retrieval/t2v_r1": 1.0}], batch_size=8)
    assert cost.flops_per_clip == (100 + 200 + 2 * 300) / 4 == 225
    assert cost.secs_per_clip == 1 / 4
    assert cost.total_flops == 225 * 40 * 8
    assert cost.total_secs == 10 * 2 + 10 * 1 + 20 * 4


def test_groups_over_seeds(folder):
    groups = group_by_seed(find_runs(folder))
    assert [group.fields for group in groups] == [{RATIO: 0.5}, {RATIO: 0.75}]
    assert [len(group.runs) for group in groups] == [2, 1]
    mean, std = groups[0].mean_std("retrieval/t2v_r1")
    assert mean == 43.0 and std == pytest.approx(math.sqrt(18))  # 3^2 + 3^2, over n - 1
    mean, std = groups[1].mean_std("retrieval/t2v_r1")
    assert mean == 30.0 and math.isnan(std)
    assert numeric_fields(groups) == [RATIO]
    assert chance_levels(groups, "retrieval/t2v_r1") == [8.3]
    assert chance_levels(groups, "retrieval/t2v_median_rank") == []


def test_csv(folder):
    report(folder)
    rows = list(csv.DictReader((folder / "report.csv").open()))
    assert [row["run"] for row in rows] == ["a", "b", "c", "deep/d", "e", "f"]
    assert [row[RATIO] for row in rows] == ["0.5", "0.5", "0.75", "0.9", "0.9", ""]
    assert [row["seed"] for row in rows] == ["0", "1", "0", "0", "1", ""]
    assert [row["retrieval/t2v_r1"] for row in rows] == ["40.0", "46.0", "30.0", "", "", ""]
    assert rows[2]["secs_per_clip"] == "0.02"  # the median of 1/100, 1/50, 1/25
    assert float(rows[2]["total_flops"]) == 1e9 * 8 * 8
    assert float(rows[2]["total_secs"]) == pytest.approx(2 * 0.08 + 2 * 0.16 + 4 * 0.32)
    assert float(rows[3]["total_secs"]) == pytest.approx(2 * 0.08 + 2 * 0.16)
    assert "name" not in rows[0] and "train.steps" not in rows[0]


def test_markdown(folder):
    report(folder)
    text = (folder / "report.md").read_text()
    lines = text.splitlines()
    counts = "6 runs: 3 complete, 1 unfinished, 2 failed; 3 left out of the means and the plots"
    assert f"{counts}." in lines
    cost = "operations per clip (billion) | seconds per clip | operations in all (10^12)"
    heads = f"text to video R@1 (%) | {cost} | seconds in all |"
    assert f"| run | seed | mask.ratio | state | {heads}" in lines
    assert "| a | 0 | 0.5 | complete, step 8 | 40.0 | 2 | 0.02 | 0.128 | 1.76 |" in lines
    unfinished = "unfinished at step 4 of 8 | | 2 | 0.015 | 0.064 | 0.48 |"
    assert f"| deep/d | 0 | 0.9 | {unfinished}" in lines
    assert "| e | 1 | 0.9 | failed at step 2 of 8: NonFiniteLoss: step 3 |" in text
    assert "| f | | | failed: ValueError: a / b | | | | | |" in lines
    assert f"| mask.ratio | n | {heads}" in lines
    assert "| 0.5 | 2 | 43.0 ± 4.2 | 2 ± 0 | 0.02 ± 0 | 0.128 ± 0 | 1.76 ± 0 |" in lines
    assert "| 0.75 | 1 | 30.0 | 1 | 0.02 | 0.064 | 1.76 |" in lines


def test_plots(folder, tmp_path, capsys):
    out = tmp_path / "elsewhere"
    report(folder, metric=("retrieval/t2v_r1", "loss/total"), out=out)
    names = ["quality_vs_mask.ratio.png", "quality_vs_operations.png", "quality_vs_seconds.png"]
    written = [*names, *(name.replace("png", "pdf") for name in names)]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*written, "report.csv", "report.md"]
    )
    for name in names:
        assert (out / name).with_suffix(".pdf").read_bytes().startswith(b"%PDF")
        pixels = np.asarray(Image.open(out / name).convert("L"))
        assert pixels.shape[1] > 2 * pixels.shape[0]  # two metrics beside each other
        assert (pixels < 128).sum() > 1000
        assert f"![{name}]({name})" in (out / "report.md").read_text()
    assert "3 left out of the means and the plots" in capsys.readouterr().out
    assert not (folder / "report.md").exists()


def test_one_legend_names_the_chance_levels_of_all_panels(folder, tmp_path, monkeypatch):
    """The first panel has one, the second none, the third another."""
    for name in ("a", "b", "c"):
        path = folder / name / "result.json"
        result = json.loads(path.read_text())
        result["metrics"] |= {"retrieval/t2v_r5": 60.0, "retrieval/t2v_chance_r5": 41.7}
        path.write_text(json.dumps(result))
    legends = []
    monkeypatch.setattr(Figure, "legend", lambda self, handles, names, **_: legends.append(names))
    report(folder, metric=("retrieval/t2v_r1", "loss/total", "retrieval/t2v_r5"), out=tmp_path)
    assert len(legends) == 3, "a picture each for the ratio and the two costs"
    for names in legends:
        assert {"chance: 8.3", "chance: 41.7"} <= {*names} and len({*names}) == len(names)


def test_a_legend_of_many_names_leaves_the_axes_free(tmp_path, monkeypatch):
    """Twelve groups that differ in four fields, so that each name has several lines."""
    for i in range(12):
        changes = {RATIO: (i + 1) / 20, "seed": 0, "model.embed_dim": 4 + i, "data.text_len": 4 + i}
        changes |= {"optim.learning_rate": 0.001 * (i + 1), "data.batch_size": 8 * (i + 1)}
        make_run(tmp_path / str(i), changes, [8], {"t2v_r1": 30.0 + i})
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *x, **y: figures.append(save(self, *x, **y) or self)
    )
    report(tmp_path)
    for figure in figures:
        [legend] = figure.legends
        for axes in figure.axes:
            assert legend.get_window_extent().y1 <= axes.get_window_extent().y0
            assert axes.get_window_extent().height > 200


def test_fields_to_plot(folder):
    """A second field that differs makes a line for each of its values; names may be short."""
    make_run(folder / "g", {RATIO: 0.75, "model.embed_dim": 4}, [8], {"t2v_r1": 20.0})
    make_run(folder / "h", {RATIO: 0.5, "model.dtype": "bfloat16"}, [8], {"t2v_r1": 20.0})
    report(folder, x=("mask.ratio", "model.dtype"))
    names = {path.name for path in folder.glob("quality_vs_*")}
    assert {"quality_vs_mask.ratio.png", "quality_vs_model.dtype.png"} < names
    assert "quality_vs_model.embed_dim.png" not in names


def test_complete_runs_without_retrieval(tmp_path):
    """There is no metric to plot by itself, but one may be asked for; one group is no plot."""
    for seed in (0, 1):
        make_run(tmp_path / str(seed), {"seed": seed}, [4, 8], {})
    report(tmp_path)
    assert "nothing to plot" in (tmp_path / "report.md").read_text()
    report(tmp_path, metric=("loss/total",))
    assert "| 2 | 8.000 ± 0.000 |" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))
    make_run(tmp_path / "2", {RATIO: 0.75}, [4, 8], {})
    report(tmp_path, metric=("loss/total",))
    assert (tmp_path / "quality_vs_seconds.png").exists()


def test_runs_of_other_data_or_protocols_share_no_axes(tmp_path):
    """Two ratios on each of two splits, and one run that is scored again."""
    for split in ("test", "val"):
        for ratio in (0.5, 0.75):
            changes = {RATIO: ratio, "data.eval.split": split}
            make_run(tmp_path / f"{split}{ratio}", changes, [8], {"t2v_r1": 40.0 * ratio})
    changes = {RATIO: 0.25, "evaluation.rerank_top_k": 4}
    make_run(tmp_path / "again", changes, [8], {"t2v_r1": 99.0})
    report(tmp_path)
    of_split = [f"eval.split={split}_evaluation.rerank_top_k=0" for split in ("test", "val")]
    axes = ("mask.ratio", "operations", "seconds")
    found = {path.stem for path in tmp_path.glob("*.png")}
    by_field = {"quality_vs_evaluation.rerank_top_k_eval.split=test"}  # an axis may differ
    assert found == by_field | {f"quality_vs_{axis}_{p}" for p in of_split for axis in axes}


def test_nothing_complete(tmp_path):
    make_run(tmp_path / "a", {"seed": 1}, [2], None)
    report(tmp_path)
    assert "nothing to plot" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "error: no such directory: nowhere"),
        (["empty"], "error: no run (a folder with config.json) in or below empty"),
        (["runs", "--x", "seed"], "do not differ in it, but in: model.video.mask.ratio"),
        (["runs", "--metric", "t2v_r1"], "no run has the metric t2v_r1; there is: loss/total,"),
    ],
)
def test_mistakes(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder.parent)
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["report", *flags])
    assert message in end.value.code and "\n" not in end.value.code
    assert not list(folder.glob("report.*"))


@pytest.mark.parametrize("seed", range(20))
def test_pareto_front_against_all_pairs(seed):
    rng = np.random.default_rng(seed)
    cost, quality = rng.integers(0, 6, (2, 12)).astype(float)  # with many ties
    cost[rng.random(12) < 0.1] = np.nan

    def beats(i: int, j: int) -> bool:
        no_worse = cost[i] <= cost[j] and quality[i] >= quality[j]
        return no_worse and (cost[i] < cost[j] or quality[i] > quality[j])

    expected = {
        j for j in range(12) if cost[j] == cost[j] and not any(beats(i, j) for i in range(12))
    }
    front = pareto_front(cost, quality)
    assert set(front.tolist()) == expected and len(front) == len(expected)
    assert (np.diff(cost[front]) >= 0).all()


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("retrieval/v2t_r10", "video to text R@10 (%)"),
        ("retrieval/t2v_median_rank", "text to video median rank"),
        ("loss/total", "loss/total"),
        ("retrieval/num_clips", "num clips"),
    ],
)
def test_labels(metric, label):
    assert heading(metric) == label


@pytest.mark.parametrize(
    ("value", "column", "text"),
    [
        (43.26, "retrieval/t2v_r1", "43.3"),
        (0.12345, "loss/total", "0.123"),
        (1.2345e10, "flops_per_clip", "12.3"),
        (12345.6, "total_secs", "12,346"),
        (math.nan, "total_secs", ""),
    ],
)
def test_numbers(value, column, text):
    assert format_number(value, column) == text


def test_a_value_that_a_run_does_not_have(folder):
    run = find_runs(folder)[0]
    assert value_of(run, "total_secs") == run.cost.total_secs
    assert math.isnan(value_of(run, "retrieval/v2t_r1"))


def test_labels_name_only_what_differs_from_most_runs():
    """Ablations of a base: a label is the change alone. Values of equal rights are all named."""

    def group(ratio: float, depth: int, kind: str = "mlp") -> Group:
        fields = {"model.video.mask.ratio": ratio, "model.video.depth": depth, "a.kind": kind}
        return Group(fields, ())

    base, shallow, dense = group(0.65, 3), group(0.65, 1), group(0.0, 3, "none")
    assert group_labels([base, shallow, dense]) == [
        "base",
        "video.depth=1",
        "mask.ratio=0.0, a.kind=none",
    ]
    ratios = [group(ratio, 3) for ratio in (0.5, 0.65, 0.75)]
    assert group_labels(ratios) == [f"mask.ratio={ratio}" for ratio in (0.5, 0.65, 0.75)]
    assert group_labels(ratios, without="model.video.mask.ratio") == ["base"] * 3
    only = [Group({"seed": 0}, ()), Group({"seed": 1}, ())]
    assert group_labels(only, without="seed") == ["", ""], "nothing else varies: no legend"
    labels = group_labels([group(r, d) for r in (0.5, 0.75) for d in (1, 2)])
    assert len({*labels}) == 4 and labels[0] == "mask.ratio=0.5, video.depth=1"
    assert group_labels([]) == []
