"""Evaluators by name: how each is computed and shown, and when a config asks for it.

To add one: a function (context, inputs) -> Result, a function that formats its metrics, a line
here, its name in `Objective.evaluators` of what it measures, and its metrics in
`vlmae.runs.metric_registry`.
"""

from collections.abc import Callable
from typing import NamedTuple

from vlmae.config.experiment import EvaluationConfig, ExperimentConfig
from vlmae.config.objectives import OBJECTIVES
from vlmae.evaluation.encode import EvalInputs
from vlmae.evaluation.labels import evaluate_labels, format_labels
from vlmae.evaluation.multiple_choice import evaluate_multiple_choice, format_choices
from vlmae.evaluation.question_answering import evaluate_answers, format_answers
from vlmae.evaluation.result import Result
from vlmae.evaluation.retrieval import evaluate_retrieval, format_retrieval
from vlmae.evaluation.zero_shot import evaluate_zero_shot, format_zero_shot
from vlmae.ops.registry import Registry
from vlmae.runs.inference import EvalContext


class Evaluator(NamedTuple):
    """Evaluation of trained objectives."""

    evaluate: Callable[[EvalContext, EvalInputs], Result]
    format: Callable[[dict[str, float]], str]
    """Makes a Markdown table of the metrics."""
    embeds: bool = False
    """Reads the unit vectors of the encoded clips."""
    fuses: Callable[[EvaluationConfig], bool] = lambda _: False
    """Reads the features of the encoded clips."""
    is_asked: Callable[[EvaluationConfig], bool] = lambda _: True
    """True if the config asks for it, where its objectives are trained."""


# Tables are printed in this order. The names are those of result files and of metrics.
EVALUATORS = Registry[Evaluator](
    "evaluator",
    {
        "retrieval": Evaluator(
            evaluate_retrieval,
            format_retrieval,
            embeds=True,
            fuses=lambda config: config.rerank_top_k > 0,
        ),
        "multiple_choice": Evaluator(
            evaluate_multiple_choice,
            format_choices,
            fuses=lambda _: True,
            is_asked=lambda config: config.choices > 0,
        ),
        "answers": Evaluator(evaluate_answers, format_answers, fuses=lambda _: True),
        # Fuses each clip with its own text, so it encodes clips by itself and keeps none of them.
        "labels": Evaluator(evaluate_labels, format_labels),
        "zero_shot": Evaluator(
            evaluate_zero_shot,
            format_zero_shot,
            embeds=True,
            is_asked=lambda config: bool(config.prompts),
        ),
    },
)


def chosen_evaluators(config: ExperimentConfig) -> dict[str, Evaluator]:
    """Select the evaluators of the trained objectives that the config asks for.

    Raises:
      ValueError: an objective names an evaluator that is not registered.
    """
    names = {name for x in config.objectives.weights for name in OBJECTIVES[x].evaluators}
    asked = {name for name in names if EVALUATORS[name].is_asked(config.evaluation)}
    if config.evaluation.prompts:  # data of classes need have neither captions nor questions
        asked = {"zero_shot"}
    return {name: evaluator for name, evaluator in EVALUATORS.items() if name in asked}
