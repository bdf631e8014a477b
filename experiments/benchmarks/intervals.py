"""Coverage of the 95 % intervals of metrics, by simulation of test sets.

    python -m experiments.benchmarks.intervals

Each case is a distribution of test sets. An interval covers if it holds the expected value of the
metric over test sets of that size. NumPy alone; the whole table takes some minutes on one core.
"""

from collections.abc import Callable, Iterator

import numpy as np

from vlmae.evaluation.intervals import Interval, label_intervals, mean_interval
from vlmae.evaluation.metrics import average_precision, f1_scores
from vlmae.runs.tables import markdown_table

SIZES = (50, 200, 1000)  # groups: clips, or ids that several clips share
SHARES = (0.02, 0.1, 0.3, 0.5, 0.9, 0.97)  # of right answers
LABELS = ((40, 0.02), (40, 0.1), (5, 0.3))  # number of labels, and the share of clips with each

Case = tuple[dict[str, float], dict[str, Interval]]  # values and intervals of one test set


def answered(rng: np.random.Generator, groups: int, share: float, several: bool) -> Case:
    """Draw yes-no answers, as behind an accuracy or a recall.

    With `several`, half of the groups have five answers, correlated by 0.3 within a group.
    """
    sizes = rng.choice([1, 5], groups) if several else np.ones(groups, int)
    chance = rng.beta(share * 7 / 3, (1 - share) * 7 / 3, groups) if several else share
    group = np.repeat(np.arange(groups), sizes)
    right = rng.random(len(group)) < np.broadcast_to(chance, groups)[group]
    return {"accuracy": 100 * share}, {"accuracy": mean_interval(right, group)}


def labeled(
    rng: np.random.Generator, groups: int, labels: int, frequency: float, several: bool
) -> Case:
    """Draw scores of labels: normal, 1.5 higher where the label is right.

    With `several`, each group is two clips of equal labels and nearly equal scores.
    """
    copies = 2 if several else 1
    correct = rng.random((groups, labels)) < frequency
    correct[0, 0] = True  # a test set without any label has no metric
    scores = rng.normal(size=correct.shape) + 1.5 * correct
    correct, scores = (x.repeat(copies, axis=0) for x in (correct, scores))
    scores += 0.01 * rng.normal(size=scores.shape)
    values = {"map": 100 * float(np.nanmean(average_precision(scores, correct)))}
    values |= f1_scores(scores > 1, correct)
    group = np.arange(groups).repeat(copies)
    return values, label_intervals(scores, scores > 1, correct, group)


def coverage(draw: Callable[..., Case], count: int, *args: object) -> dict[str, float]:
    """Compute the share of test sets whose interval holds the mean value of all of them.

    `draw` takes a random generator and `args`.
    """
    rng = np.random.default_rng(0)
    values, intervals = zip(*(draw(rng, *args) for _ in range(count)), strict=True)
    found = {}
    for name in values[0]:
        truth = np.mean([value[name] for value in values])
        found[name] = float(np.mean([x[name][0] <= truth <= x[name][1] for x in intervals]))
    return found


def rows(count: int) -> Iterator[list[str]]:
    """Yield the rows of the table, one for each kind of test set and metric."""
    for several, kind in ((False, "single clips"), (True, "groups")):
        for share in SHARES:
            found = [coverage(answered, count, size, share, several) for size in SIZES]
            cells = [f"{100 * x['accuracy']:.0f}" for x in found]
            yield [f"accuracy or recall of {100 * share:.0f} %, {kind}", *cells]
        for labels, share in LABELS:
            found = [coverage(labeled, count // 2, n, labels, share, several) for n in SIZES]
            for name, title in (("map", "mAP"), ("micro_f1", "micro F1"), ("macro_f1", "macro F1")):
                cells = [f"{100 * x[name]:.0f}" for x in found]
                yield [f"{title}, {labels} labels of {100 * share:.0f} %, {kind}", *cells]


def main(sets: int = 1000) -> None:
    """Print the table.

    Args:
      sets: simulated test sets of each case.
    """
    head = ["coverage in percent", *(f"n = {size:,}" for size in SIZES)]
    print(markdown_table([head, *rows(sets)]))


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
