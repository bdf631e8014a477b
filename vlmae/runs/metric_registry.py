"""Metrics by name: label, unit, direction and chance level, as reports and figures show them.

To add a metric: return it from an objective or an evaluator, and add a line here.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from data_pipelines.schema.checks import UserError


class Metric(NamedTuple):
    """Presentation of a metric."""

    label: str
    better: Literal["higher", "lower", "neither"] = "higher"
    decimals: int = 3
    is_percent: bool = False
    chance: str = ""
    """Name of the metric that a guess reaches beside this one; empty: there is none."""
    is_main: bool = False
    """Reports have a column for it."""

    @property
    def title(self) -> str:
        """Label with its unit."""
        return f"{self.label} (%)" if self.is_percent else self.label


def _percent(label: str, chance: str = "", is_main: bool = False) -> Metric:
    return Metric(label, decimals=1, is_percent=True, chance=chance, is_main=is_main)


def _count(label: str) -> Metric:
    return Metric(label, "neither", decimals=0)


def _retrieval(prefix: str, direction: str, is_main: bool = False) -> dict[str, Metric]:
    """Metrics of one direction of retrieval; `prefix` as in "t2v" or "dual_softmax_t2v"."""
    name, metrics = f"retrieval/{prefix}", {}
    for key, label in {"r1": "R@1", "r5": "R@5", "r10": "R@10", "mrr": "MRR"}.items():
        title, chance = f"{direction} {label}", f"{direction} chance {label}"
        metrics[f"{name}_{key}"] = _percent(title, f"{name}_chance_{key}", is_main)
        metrics[f"{name}_chance_{key}"] = _percent(chance)
    for kind in ("median", "mean"):
        label, shown = f"{direction} {kind} rank", is_main and kind == "median"
        metrics[f"{name}_{kind}_rank"] = Metric(label, "lower", decimals=1, is_main=shown)
    for key, label in {"mean_log_rank": "mean log rank", "info_nce": "InfoNCE"}.items():
        measure = Metric(f"{direction} {label}", "lower", chance=f"{name}_chance_{key}")
        metrics[f"{name}_{key}"] = measure._replace(is_main=is_main)
        metrics[f"{name}_chance_{key}"] = Metric(f"{direction} chance {label}", "lower")
    metrics[f"{name}_temperature"] = Metric(f"{direction} temperature of InfoNCE", "neither")
    return metrics


# Regular expressions of whole names; the first that matches counts. Labels may use their groups.
# Reports have their columns in this order, and plot the first main metric that a run has.
METRICS: dict[str, Metric] = {
    **_retrieval("t2v", "text to video", is_main=True),
    **_retrieval("v2t", "video to text", is_main=True),
    **_retrieval("dual_softmax_t2v", "dual softmax, text to video"),
    **_retrieval("dual_softmax_v2t", "dual softmax, video to text"),
    "retrieval/num_clips": _count("num clips"),
    "retrieval/bad_clips": _count("bad clips")._replace(better="lower"),
    "answers/accuracy": _percent("answer accuracy", "answers/frequent_accuracy", is_main=True),
    r"answers/accuracy_(.+)": _percent(r"answer accuracy, \1"),
    "answers/frequent_accuracy": _percent("most frequent answer accuracy"),
    r"answers/frequent_accuracy_(.+)": _percent(r"most frequent answer accuracy, \1"),
    "answers/answerable": _percent("answerable questions"),
    "answers/nll": Metric("answer negative log-likelihood", "lower"),
    "answers/(num|skipped)_questions": _count(r"\1 questions"),
    "multiple_choice/match_accuracy": _percent(
        "multiple choice by VTM", "multiple_choice/chance_accuracy", is_main=True
    ),
    "multiple_choice/mcm_accuracy": _percent(
        "multiple choice by MCM", "multiple_choice/chance_accuracy", is_main=True
    ),
    r"multiple_choice/match_accuracy_(.+)": _percent(r"multiple choice by VTM, \1"),
    r"multiple_choice/mcm_accuracy_(.+)": _percent(r"multiple choice by MCM, \1"),
    "multiple_choice/chance_accuracy": _percent("multiple choice by chance"),
    "multiple_choice/match_nll": Metric(
        "multiple choice by VTM, negative log-likelihood",
        "lower",
        chance="multiple_choice/chance_nll",
    ),
    "multiple_choice/mcm_nll": Metric(
        "multiple choice by MCM, negative log-likelihood",
        "lower",
        chance="multiple_choice/chance_nll",
    ),
    "multiple_choice/chance_nll": Metric(
        "multiple choice by chance, negative log-likelihood", "lower"
    ),
    "multiple_choice/(num|skipped|cut)_questions": _count(r"\1 questions"),
    "labels/map": _percent("label mAP", "labels/chance_map", is_main=True),
    "labels/chance_map": _percent("label chance mAP"),
    "labels/(micro|macro)_f1": _percent(r"label \1 F1"),
    "labels/num_(clips|labels)": _count(r"num \1"),
    "zero_shot/top1": _percent("zero-shot top-1", "zero_shot/chance_top1", is_main=True),
    "zero_shot/top5": _percent("zero-shot top-5"),
    "zero_shot/mean_per_class": _percent("zero-shot mean per class"),
    "zero_shot/chance_top1": _percent("zero-shot chance top-1"),
    "zero_shot/num_(clips|classes)": _count(r"num \1"),
    "zero_shot/bad_clips": _count("bad clips")._replace(better="lower"),
    r"loss/(\w+)": Metric(r"loss/\1", "lower"),
    "(vtc|vtm|mlm|mcm|answer)/accuracy": Metric(r"\1 accuracy in training, a fraction"),
    "(mcm|answer)/valid_ratio": Metric(r"\1 fraction of rows with a question"),
    "mcm/cut_ratio": Metric("mcm fraction of questions that are cut", "lower"),
    "vtc/temperature": Metric("vtc temperature", "neither"),
    "vtc/bias": Metric("vtc bias", "neither"),
    "tokens/(video_kept|text)": Metric(r"tokens/\1", "lower"),
    "data/bad_ratio": Metric("fraction of bad clips", "lower"),
    "optim/skipped_ratio": Metric("fraction of skipped steps", "lower"),
    "optim/(grad_norm|param_norm|learning_rate)": Metric(r"optim/\1", "neither"),
    "speed/(clips_per_sec|matrix_rate_share)": Metric(r"speed/\1"),
    "speed/(secs_per_step|data_wait_share|flops_per_clip|network_bytes)": Metric(
        r"speed/\1", "lower"
    ),
    "memory/peak_bytes": Metric("memory/peak_bytes", "lower"),
}
# Results of an evaluation at the keep rate of training, see `evaluation.also_pruned`.
PRUNED = "pruned_"
EVALUATED = ("retrieval/", "answers/", "multiple_choice/", "labels/", "zero_shot/")
METRICS |= {
    f"{PRUNED}{name}": metric._replace(
        label=f"pruned, {metric.label}", chance=metric.chance and f"{PRUNED}{metric.chance}"
    )
    for name, metric in METRICS.items()
    if name.startswith(EVALUATED)
}
HEADLINE = 4  # figures of an evaluation that the console shows
# Every regular expression of a main metric is its plain name.
MAIN_METRICS = tuple(name for name, metric in METRICS.items() if metric.is_main)


def headline(metrics: Mapping[str, float]) -> str:
    """Return the first main figures of an evaluation, each beside what a guess reaches.

    >>> headline({"labels/map": 41.5, "labels/chance_map": 12.0})
    'label mAP 41.5 % (a guess: 12.0)'
    """
    shown = []
    for name in [name for name in MAIN_METRICS if name in metrics][:HEADLINE]:
        metric = METRICS[name]
        text = f"{metric.label} {metrics[name]:.{metric.decimals}f}{' %' * metric.is_percent}"
        if metric.chance in metrics:
            text += f" (a guess: {metrics[metric.chance]:.{metric.decimals}f})"
        shown.append(text)
    return ", ".join(shown) or "evaluated"


def losses_and_accuracies(
    metrics: Mapping[str, float], guesses: Mapping[str, float] = MappingProxyType({})
) -> str:
    """Return the loss of each objective, with its accuracy beside that of a guess.

    Args:
      metrics: of training.
      guesses: accuracy that a guess reaches, a fraction, by objective.

    >>> losses_and_accuracies({"loss/vtm": 0.6, "vtm/accuracy": 0.7}, {"vtm": 2 / 3})
    'vtm 0.600 (right 70 %, a guess 67)'
    """
    shown = []
    for name, value in metrics.items():
        objective = name.removeprefix("loss/")
        if objective == name or objective == "total":
            continue
        text, accuracy = f"{objective} {value:.3f}", metrics.get(f"{objective}/accuracy")
        if accuracy is not None:
            beside = f", a guess {100 * guesses[objective]:.0f}" if objective in guesses else ""
            text += f" (right {100 * accuracy:.0f} %{beside})"
        shown.append(text)
    return "  ".join(shown)


def metric_of(name: str) -> Metric:
    """Look up the presentation of a metric.

    Raises:
      UserError: nothing is registered under the name, so its direction is unknown.
    """
    for pattern, metric in METRICS.items():
        if found := re.fullmatch(pattern, name):
            return metric._replace(label=found.expand(metric.label))
    raise UserError(f"{name} is no metric of vlmae.runs.metric_registry: add its line there")
