"""Training objectives as data: inputs, parts of the model, and evaluation of each.

The loss functions are in `vlmae.training.objectives`, under the same names. Config checks, feature
extraction, evaluation, exports and the model card read this registry instead of naming objectives.
To add an objective: an entry here, at the end, a weight of the same name in `ObjectivesConfig`, and
a function there.
"""

from typing import NamedTuple

from vlmae.ops.registry import Registry


class Objective(NamedTuple):
    """Inputs and outputs of a training objective."""

    caption: bool = False
    """Reads the text of a row, a caption or a question, with no token masked."""
    masked_text: bool = False
    """Reads the text with masked tokens, fused with its own video."""
    hard_pairs: bool = False
    """Reads each pair fused as it is, with a hard video negative and with a hard text negative."""
    fuses: bool = False
    """Trains the fusion of text and video, by features shared with other objectives or alone."""
    removed_patches: bool = False
    """Predicts the patches that the visual mask removes."""
    task: str = ""
    """Value of `data.task` that the targets come from; empty: any."""
    # Read off the parameters, since a checkpoint of any age has those, and no config need agree.
    heads: tuple[str, ...] = ()
    """Top-level parameters by which a checkpoint shows that it was trained with this objective:
    one for each kind of head that the config can choose."""
    evaluators: tuple[str, ...] = ()
    """Names in `vlmae.evaluation.evaluators.EVALUATORS` that measure it; none: only its loss is
    reported."""


# The order is part of every run's randomness: key i of a step belongs to objective i. New ones go
# to the end, where they leave the keys of all others as they are.
OBJECTIVES = Registry[Objective](
    "objective",
    {
        "vtc": Objective(
            caption=True, heads=("temperature",), evaluators=("retrieval", "zero_shot")
        ),
        "vtm": Objective(
            caption=True,
            hard_pairs=True,
            fuses=True,
            heads=("match_head",),
            evaluators=("multiple_choice",),
        ),
        "mlm": Objective(masked_text=True, fuses=True, heads=("word_transform",)),
        # Neither caption nor fusion: the decoder sees visual tokens alone (MAE).
        "mvm": Objective(removed_patches=True, heads=("pixel_decoder",)),
        # No caption: its text is the question that the options are composed into.
        "mcm": Objective(fuses=True, heads=("choice_head",), evaluators=("multiple_choice",)),
        "answer": Objective(
            caption=True,
            fuses=True,
            task="questions",
            heads=("classifier", "answer_decoder"),
            evaluators=("answers",),
        ),
        "label": Objective(
            caption=True, fuses=True, task="labels", heads=("classifier",), evaluators=("labels",)
        ),
    },
)

# Every head of an objective once, in the order of the registry.
HEADS = tuple(dict.fromkeys(head for x in OBJECTIVES.values() for head in x.heads))


def objectives_with(field: str, name: str) -> list[str]:
    """Name the objectives that train a head ("heads"), or that an evaluator measures."""
    return [key for key, objective in OBJECTIVES.items() if name in getattr(objective, field)]
