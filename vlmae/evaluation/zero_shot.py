"""Zero-shot classification: the class whose prompts fit a clip best (CLIP)."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from data_pipelines.loading.evaluation import EvalData
from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.json_files import read_text
from data_pipelines.schema.records import Texts
from vlmae.config.experiment import EvaluationConfig
from vlmae.evaluation.encode import EvalInputs, encode_texts
from vlmae.evaluation.intervals import mean_interval
from vlmae.evaluation.metrics import best_ranks
from vlmae.evaluation.ranking import top_k
from vlmae.evaluation.result import Result
from vlmae.figures.answer_page import Item, Line, Shown
from vlmae.runs.inference import EvalContext
from vlmae.runs.tables import markdown_table

SHOWN = 5  # classes of each prediction
NAMED = 5  # of what is wrong, in a message


class PromptedClasses(NamedTuple):
    """Classes of a split, and the texts that stand for them."""

    templates: list[str]
    names: dict[str, str]  # label -> name in prompts
    labels: Int[np.ndarray, " n"]  # number of each clip's class


def read_classes(data: EvalData, config: EvaluationConfig) -> PromptedClasses:
    """Read templates and names, and find each clip's class; call it before clips are encoded.

    Raises:
      UserError, MissingError: see `read_templates`, `read_names` and `number_labels`.
    """
    templates = read_templates(config.prompts)
    names = read_names(Path(config.labels).expanduser()) if config.labels else own_names(data)
    labels = number_labels(data.names, data.labels, list(names))
    return PromptedClasses(templates, names, labels)


def evaluate_zero_shot(context: EvalContext, inputs: EvalInputs) -> Result:
    """Compare every clip with the prompts of every class; the clips must hold embeddings.

    A class is the normalized mean of its prompts' unit vectors (Radford et al. 2021, CLIP, section
    3.1.4). Classes that score like the right one count against it. Clips that cannot be decoded are
    left out.

    Returns:
      Metrics in percent: `top1`, `top5`, `mean_per_class` (of top1, over classes that have clips),
      `chance_top1`; `num_clips`, `num_classes`, `bad_clips`.

    Raises:
      UserError: no clip can be decoded; see `read_classes`.
    """
    data, clips, config = inputs.data, inputs.clips, inputs.config
    check(
        len(clips.rows) > 0,
        f"none of the {data.num_clips} clips can be decoded; pictures need --num-frames 1",
    )
    templates, names, labels = read_classes(data, config)
    labels = labels[clips.rows]
    prompts = [fill(template, name) for name in names.values() for template in templates]
    scores = clips.embeddings @ embed_classes(context, data, prompts, len(names)).T
    correct = labels[:, None] == np.arange(len(names))
    ranks = best_ranks(scores, correct)
    groups = data.media_ids[clips.rows]
    metrics = {
        "top1": 100 * float((ranks <= 1).mean()),
        "top5": 100 * float((ranks <= 5).mean()),
        "mean_per_class": mean_per_class(ranks <= 1, labels),
        "chance_top1": 100 / len(names),
        "num_clips": float(len(labels)),
        "num_classes": float(len(names)),
        "bad_clips": float(data.num_clips - len(labels)),
    }
    intervals = {name: mean_interval(ranks <= k, groups) for name, k in (("top1", 1), ("top5", 5))}
    predictions, items = describe(data, clips.rows, [*names.values()], labels, scores)
    facts = {"prompts": "; ".join(templates[:NAMED]) + ("; ..." if templates[NAMED:] else "")}
    if cut := data.count_cut(prompts):
        facts["cut"] = f"{cut} of {len(prompts)} prompts are longer than --data.text-len"
    return Result(metrics, intervals, predictions, items, facts)


def embed_classes(
    context: EvalContext, data: EvalData, prompts: Sequence[str], count: int
) -> Float[np.ndarray, "c e"]:
    """Embed the prompts, equally many of each class in a row, and average those of a class."""
    ids, mask = data.tokenize(prompts)
    rows = np.arange(len(prompts), dtype=np.int32)
    vectors = encode_texts(context, Texts(ids, mask, rows, rows, tuple(prompts))).embeddings
    means = vectors.reshape(count, -1, vectors.shape[-1]).mean(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def mean_per_class(right: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Average the shares of right clips of the classes that have any, in percent."""
    counts = np.bincount(labels)
    shares = np.bincount(labels, weights=right)[counts > 0] / counts[counts > 0]
    return 100 * float(shares.mean())


def read_templates(prompts: Sequence[str]) -> list[str]:
    """Return templates with a {} for the class; a text without one is a file, a template a line.

    Raises:
      UserError: neither has a {}; names the text, or file and line.
      MissingError: there is no such file.
    """
    templates = []
    for text in prompts:
        if "{}" in text:
            templates.append(text)
            continue
        path = Path(text).expanduser()
        check(path.is_file(), f"--prompts {text!r} has no {{}} for the class, and is no file")
        found = _lines(path)
        for number, line in found:
            check("{}" in line, f"{path}:{number}: {line!r} has no {{}} for the class")
        check(bool(found), f"{path} holds no template, such as: a video of {{}}")
        templates += [line for _, line in found]
    return list(dict.fromkeys(templates))


def read_names(path: Path) -> dict[str, str]:
    """Read classes, one a line: a label of the data, or a label, a tab, and its name in prompts.

    Returns:
      Label -> name in prompts, in order.

    Raises:
      UserError: no class, or a label twice; names file and line.
      MissingError: there is no such file.
    """
    names: dict[str, str] = {}
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        label, _, name = (part.strip() for part in line.partition("\t"))
        first = seen.setdefault(_key(label), number)
        check(first == number, f"{path}:{number}: {label!r} stands in line {first} already")
        names[label] = name or in_words(label)
    check(bool(names), f"{path} names no class; a name in each line is expected")
    return names


def own_names(data: EvalData) -> dict[str, str]:
    """Return the labels of the split itself as classes, ordered by name."""
    labels = sorted({label for of_clip in data.labels for label in of_clip})
    return {label: in_words(label) for label in labels}


def number_labels(
    clips: Sequence[str], of_clips: Sequence[Sequence[str]], names: Sequence[str]
) -> Int[np.ndarray, " n"]:
    """Return the number of each clip's class; case, "_" and spaces are alike in its label.

    Raises:
      UserError: a clip has no label or several, or its label is none of the names; says which.
    """
    check(
        any(of_clips),
        "no clip of this split has a label: prepare it from a folder for each class, or from a "
        "table with a column `labels`",
    )
    for clip, found in zip(clips, of_clips, strict=True):
        check(
            len(found) == 1,
            f"{clip} has {len(found)} labels ({', '.join(found[:NAMED]) or 'none'}), but each clip "
            "must have one class",
        )
    numbers = {_key(name): number for number, name in enumerate(names)}
    labels = [found[0] for found in of_clips]
    unknown = sorted({label for label in labels if _key(label) not in numbers})
    if unknown:
        raise UserError(_unknown(unknown, names, len({*labels})))
    return np.array([numbers[_key(label)] for label in labels])


def _unknown(unknown: Sequence[str], names: Sequence[str], count: int) -> str:
    lines = []
    for label in unknown[:NAMED]:
        close = difflib.get_close_matches(label, names, n=1)
        lines.append(repr(label) + (f" (perhaps {close[0]!r}?)" if close else ""))
    more = f" and {len(unknown) - NAMED} more" if unknown[NAMED:] else ""
    return (
        f"{len(unknown)} of the {count} labels of the data are not among the {len(names)} of "
        f"--labels: {', '.join(lines)}{more}; a line may give a label, a tab and its name"
    )


def fill(template: str, name: str) -> str:
    """Put the name of a class into a template; other braces stay as they are."""
    return template.replace("{}", name)


def in_words(label: str) -> str:
    """Return a label as it is said: "riding_a_bike" becomes "riding a bike"."""
    return label.replace("_", " ")


def _key(label: str) -> str:
    return " ".join(in_words(label).casefold().split())


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not empty, with their numbers from 1."""
    numbered = enumerate(read_text(path).splitlines(), start=1)
    return [(number, line.strip()) for number, line in numbered if line.strip()]


def describe(
    data: EvalData,
    rows: Int[np.ndarray, " n"],
    names: Sequence[str],
    labels: Int[np.ndarray, " n"],
    scores: Float[np.ndarray, "n c"],
) -> tuple[list[dict], list[Item]]:
    """List the class of each clip and the five that fit best, as records and to be drawn."""
    predictions, items = [], []
    best = top_k(scores, min(SHOWN, len(names)))
    for row, clip in enumerate(rows):
        truth = names[labels[row]]
        predicted = {names[i]: round(float(scores[row, i]), 4) for i in best[row]}
        predictions.append({"clip": data.names[clip], "label": truth, "predicted": predicted})
        lines = [Line(f"truth: {truth}")]
        lines += [Line(f"{score:.2f}  {name}", name == truth) for name, score in predicted.items()]
        items.append(Item(data.names[clip], [Shown(int(clip), "", None)], lines))
    return predictions, items


def format_zero_shot(metrics: dict[str, float]) -> str:
    """Format the metrics as a Markdown table."""
    names = ("top1", "top5", "mean_per_class", "chance_top1")
    head = ["top-1", "top-5", "mean per class", "chance top-1"]
    return markdown_table([head, [f"{metrics[name]:.1f}" for name in names]])
