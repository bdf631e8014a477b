"""Metrics by name: direction, unit, label, chance."""

import pytest

from data_pipelines.schema.checks import UserError
from vlmae.runs.metric_registry import MAIN_METRICS, METRICS, metric_of


@pytest.mark.parametrize(
    ("name", "title", "better"),
    [
        ("retrieval/t2v_r5", "text to video R@5 (%)", "higher"),
        ("retrieval/v2t_mean_rank", "video to text mean rank", "lower"),
        ("retrieval/t2v_mrr", "text to video MRR (%)", "higher"),
        ("retrieval/v2t_mean_log_rank", "video to text mean log rank", "lower"),
        ("retrieval/t2v_info_nce", "text to video InfoNCE", "lower"),
        ("retrieval/t2v_temperature", "text to video temperature of InfoNCE", "neither"),
        ("retrieval/dual_softmax_t2v_r1", "dual softmax, text to video R@1 (%)", "higher"),
        ("answers/accuracy_how many", "answer accuracy, how many (%)", "higher"),
        ("multiple_choice/skipped_questions", "skipped questions", "neither"),
        ("loss/vtc", "loss/vtc", "lower"),
        ("speed/clips_per_sec", "speed/clips_per_sec", "higher"),
        ("vtc/temperature", "vtc temperature", "neither"),
    ],
)
def test_a_metric_has_a_title_and_a_direction(name, title, better):
    metric = metric_of(name)
    assert (metric.title, metric.better) == (title, better)


def test_main_metrics_and_chance_levels_are_registered():
    assert MAIN_METRICS[0] == "retrieval/t2v_r1"
    assert all(metric_of(name).is_main for name in MAIN_METRICS)
    chances = {metric.chance: metric for metric in METRICS.values() if metric.chance}
    assert {"retrieval/v2t_chance_r10", "labels/chance_map", "retrieval/t2v_chance_info_nce"} < {
        *chances
    }
    for name, metric in chances.items():
        assert metric_of(name).is_percent == metric.is_percent, "a chance level has its unit"


def test_an_unknown_metric_is_an_error_that_names_the_registry():
    with pytest.raises(UserError, match=r"novel/score.*metric_registry"):
        metric_of("novel/score")
