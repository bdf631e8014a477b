"""MuLTI's parts together in the running system: training, continuing, evaluating, explaining."""

import json
import shutil

import pytest

from data_pipelines.schema.checks import UserError
from vlmae.config.experiment import load_config
from vlmae.evaluation.evaluate import evaluate_workdir
from vlmae.runs.metric_writer import read_metrics
from vlmae.training.operations import trace_gradients
from vlmae.training.step_cost import count_flops, sum_flops

MULTI = (
    *("--model.fusion.kind", "multiway", "--model.fusion.sampler.video-latents", "3"),
    *("--model.fusion.sampler.text-latents", "2", "--model.text.max-len", "64"),
    *("--objectives.mcm", "1.0", "--objectives.mcm-len", "64", "--data.num-others", "3"),
    *("--model.video.adapter.frozen-blocks", "1", "--model.video.adapter.width", "8"),
    *("--model.video.frames-per-chunk", "1"),
)


def test_a_run_with_all_of_multi(run_tiny, tiny_data_dir, tmp_path, capsys):
    data_dir = shutil.copytree(tiny_data_dir, tmp_path / "data")
    flags = (*MULTI, "--data.data-dir", str(data_dir))
    code, err, workdir = run_tiny(*flags)
    assert (code, "rror" in err) == (0, False), err
    lines = [line for line in read_metrics(workdir) if "loss/total" in line]
    assert len(lines) == 8
    for name in ("loss/vtc", "loss/vtm", "loss/mlm", "loss/mvm", "loss/mcm"):
        assert all(line[name] > 0 for line in lines)
    assert all(line["mcm/valid_ratio"] == 1 for line in lines)
    config = load_config(workdir / "config.json")
    flops = sum_flops(count_flops(trace_gradients(config, num_frames=2))).total
    assert all(line["speed/flops_per_clip"] == flops / config.data.batch_size for line in lines)
    assert all(0 < line["speed/matrix_rate_share"] < 1 for line in lines)
    config = json.loads((workdir / "config.json").read_text())
    assert config["objectives"]["mcm_template_ids"].count(-1) == 4
    final = json.loads((workdir / "result.json").read_text())["metrics"]

    code, err, _ = run_tiny(*flags)  # complete: restored with its frozen parameters, evaluated
    assert code == 0, err
    assert json.loads((workdir / "result.json").read_text())["metrics"] == final
    [reranked] = evaluate_workdir(workdir, rerank_top_k=4, choices=4).values()
    assert 0 <= reranked["multiple_choice/mcm_accuracy"] <= 100
    assert {"multiple_choice/match_accuracy", "multiple_choice/chance_accuracy"} <= set(reranked)
    assert reranked["retrieval/num_clips"] == final["retrieval/num_clips"] == 12

    both = evaluate_workdir(workdir, split=("test", "val"))  # temperatures come from val
    assert [*both] == ["test", "val"] and both["val"]["retrieval/num_clips"] == 8
    for name in ("retrieval/t2v_temperature", "retrieval/v2t_temperature"):
        assert both["test"][name] == both["val"][name] != final[name]
    for split in both:
        stored = json.loads((workdir / f"evaluation_{split}" / "retrieval.json").read_text())
        assert stored["temperature_split"] == "val"
        assert (
            "temperature_split: val"
            in (workdir / f"evaluation_{split}" / "retrieval.md").read_text()
        )
    shutil.copytree(data_dir / "shapes", data_dir / "twin")
    [other] = evaluate_workdir(workdir, data="twin").values()
    assert other == pytest.approx(final)
    assert (workdir / "evaluation_twin_test" / "retrieval.json").exists()
    with pytest.raises(UserError, match=f"no run here; runs below it: .*{workdir.name}"):
        evaluate_workdir(workdir.parent)
    with pytest.raises(UserError, match="--temperature-split train is none of --split test val"):
        evaluate_workdir(workdir, split=("test", "val"), temperature_split="train")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--objectives.mcm-len", "12"), "--objectives.mcm-len=12"),
        (("--objectives.mcm-len", "65"), "--model.text.max-len=64"),
        (("--data.num-others", "2"), "--data.num-others=2, but --objectives.mcm-template needs 3"),
        (("--objectives.mcm-template", "what? {}"), "--objectives.mcm-template must"),
        (("--model.video.frames-per-chunk", "-1"), "--model.video.frames-per-chunk must"),
    ],
)
def test_mistakes_end_with_one_line(run_tiny, flags, message):
    code, err, workdir = run_tiny(*MULTI, *flags)
    assert code != 0
    assert message in " ".join(err.split()).replace("│ ", "")
    assert not (workdir / "config.json").exists()
