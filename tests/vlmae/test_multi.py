"""MuLTI's parts together in the running system: training, continuing, evaluating, explaining."""

import json

import pytest

from vlmae.analysis.operations import operations_per_clip
from vlmae.config import load_config
from vlmae.evaluate import evaluate_workdir
from vlmae.metric_writer import read_metrics

MULTI = (
    *("--model.fusion.kind", "multiway", "--model.fusion.sampler.video-latents", "3"),
    *("--model.fusion.sampler.text-latents", "2", "--model.text.max-len", "64"),
    *("--objectives.mcm", "1.0", "--objectives.mcm-len", "64", "--data.num-others", "3"),
    *("--model.video.adapter.frozen-blocks", "1", "--model.video.adapter.width", "8"),
    *("--model.video.frames-per-chunk", "1"),
)


def test_a_run_with_all_of_multi(run_tiny, capsys):
    code, err, workdir = run_tiny(*MULTI)
    assert (code, "rror" in err) == (0, False), err
    lines = [line for line in read_metrics(workdir) if "loss/total" in line]
    assert len(lines) == 8
    for name in ("loss/vtc", "loss/vtm", "loss/mlm", "loss/mvm", "loss/mcm"):
        assert all(line[name] > 0 for line in lines)
    assert all(line["mcm/asked_ratio"] == 1 for line in lines)
    operations = operations_per_clip(load_config(workdir / "config.json"), num_frames=2)
    assert all(line["speed/flops_per_clip"] == operations for line in lines)
    assert all(0 < line["speed/matrix_rate_share"] < 1 for line in lines)
    config = json.loads((workdir / "config.json").read_text())
    assert config["objectives"]["mcm_template_ids"].count(-1) == 4
    final = json.loads((workdir / "result.json").read_text())["metrics"]

    code, err, _ = run_tiny(*MULTI)  # complete: restored with its frozen parameters, evaluated
    assert code == 0, err
    assert json.loads((workdir / "result.json").read_text())["metrics"] == final
    reranked = evaluate_workdir(workdir, rerank_top_k=4, choices=4)
    assert 0 <= reranked["multiple_choice/mcm_accuracy"] <= 100
    assert {"multiple_choice/match_accuracy", "multiple_choice/chance_accuracy"} <= set(reranked)
    assert reranked["retrieval/num_clips"] == final["retrieval/num_clips"] == 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--objectives.mcm-len", "12"), "objectives.mcm_len=12"),
        (("--objectives.mcm-len", "65"), "objectives.mcm_len=65 exceeds model.text.max_len=64"),
        (("--data.num-others", "2"), "data.num_others=2, but objectives.mcm_template needs 3"),
        (("--objectives.mcm-template", "what? {}"), "must have at least two {}"),
        (("--model.video.frames-per-chunk", "-1"), "frames_per_chunk must not be negative"),
    ],
)
def test_mistakes_end_with_one_line(run_tiny, flags, message):
    code, err, workdir = run_tiny(*MULTI, *flags)
    assert code != 0
    assert message in " ".join(err.split()).replace("│ ", "")
    assert not (workdir / "config.json").exists()
