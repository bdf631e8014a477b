"""MuLTI's parts where text is long, at equal operations and over paired seeds.

    python experiments/offline/multi_claims.py study               # all runs; resumes
    python experiments/offline/multi_claims.py report              # table of paired differences
    python experiments/offline/multi_claims.py resampler --seed 1  # one run of one method

Three shapes move in each clip, and its caption has a sentence for each: 39 words. Every method
trains until it has used the operations of MuLTI's steps. Seeds are paired: with one of them all
methods start from the same parameters where they have the same, and see the same clips.

Questions, fixed before the runs. Against MuLTI, is each of these worse in every seed?
    resampler      latents start from learned queries alone, without pooled tokens
    own_attention  text, video and fusion have an attention each in place of a shared one
    no_mcm         no multiple choice modeling; more steps in its place
Quality is told by what tells models apart: mean log rank and InfoNCE of retrieval by VTC, and the
negative log-likelihood of the right one of four captions by the matching head and by MCM's.

Result: docs/results.md, "MuLTI's claims" (undecided for the first two in 270 steps; MCM does not
pay in so few).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import quickstart
from experiments.offline import claims
from experiments.sweeps import SWEEPS, UNPRUNED
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.figures.cost_to_reach import RETRIEVAL, quality_of
from vlmae.runs.atomic_files import write_whole
from vlmae.runs.metric_registry import metric_of
from vlmae.runs.summary import COMPLETE, Run, find_runs
from vlmae.runs.tables import markdown_table
from vlmae.training.operations import flops_per_clip

VOCAB_SIZE = 64  # about that of the shapes' tokenizer, for counting operations
BASE = UNPRUNED | {
    "data.train.0.name": "shapes_3",
    "data.text_len": 56,
    "model.text.max_len": 64,
    "model.video.mask.ratio": 0.0,
    "model.fusion.kind": "multiway",
    "model.fusion.depth": 2,
    "model.fusion.sampler.video_latents": 16,
    "model.fusion.sampler.text_latents": 8,
    "objectives.mvm": 0.0,
    "objectives.mcm": 1.0,
    "objectives.mcm_kind": "score",  # a list of four such captions would be cut
    "objectives.mcm_len": 64,
    "optim.warmup_steps": 60,
    "evaluation.choices": 4,
    "evaluation.pictures": 0,
    "train.save_every_steps": 10_000,
}
REFERENCE = "multi"
METHODS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "resampler": {"model.fusion.sampler.pooling": "none"},
    "own_attention": {"model.fusion.sampler.share_attention": False},
    "no_mcm": {"objectives.mcm": 0.0},
}
# What the table shows -> metrics whose mean it is. The lower, the better.
QUALITIES = {name: RETRIEVAL[name] for name in ("mean log rank", "InfoNCE")} | {
    f"{head}, nats": (f"multiple_choice/{key}_nll",)
    for head, key in {"matching": "match", "MCM": "mcm"}.items()
}


def build(name: str) -> ExperimentConfig:
    """Return the config of one of METHODS."""
    changes = {**BASE, **METHODS[name], "name": f"multi_claims_{name}"}
    return override(quickstart.get_config(), changes)


VARIANTS = {name: lambda name=name: build(name) for name in METHODS}


def study(
    workdir: Path = Path("runs/multi_claims"),
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 450,
) -> None:
    """Run all runs, each in a process of its own; complete ones are passed over.

    Args:
      workdir: folder of all runs.
      methods: of METHODS.
      seeds: the same for all methods.
      steps: of MuLTI; the other methods have those that cost as many operations.
    """
    flops = {
        name: flops_per_clip(override(build(name), {"model.text.vocab_size": VOCAB_SIZE}))
        for name in {REFERENCE, *methods}
    }
    of_method = {name: round(steps * flops[REFERENCE] / flops[name]) for name in methods}
    claims.run_missing(
        __file__,
        (
            [
                *(name, "--seed", str(seed), "--train.steps", str(of_method[name])),
                *("--workdir", str(workdir / name / f"seed_{seed}")),
            ]
            for seed in seeds
            for name in methods
        ),
    )


def report(workdir: Path = Path("runs/multi_claims")) -> None:
    """Write the table of all methods' differences to MuLTI, and print it.

    Args:
      workdir: folder of the study.
    """
    found: dict[str, dict[int, Run]] = {name: {} for name in METHODS}
    runs = find_runs(workdir)
    for run in runs:
        if run.state == COMPLETE:
            found[run.title.removeprefix("multi_claims_")][run.fields["seed"]] = run
    table = markdown_table(compare(found))
    write_whole(workdir / "table.md", table + "\n")
    print(table)
    if left_out := [run.name for run in runs if run.state != COMPLETE]:
        print(f"\nleft out, not complete: {', '.join(left_out)}")


def compare(found: Mapping[str, Mapping[int, Run]]) -> list[list[str]]:
    """Make the rows of the table: MuLTI's means, and each method's differences to it by seed.

    Args:
      found: the runs of each of METHODS, by seed.

    Returns:
      A heading and a row a method: the mean difference over seeds that both have, and the lowest
      and highest of them.
    """
    rows = [["method", "seeds", "steps", *QUALITIES]]
    for name, runs in found.items():
        seeds = [seed for seed in runs if seed in found[REFERENCE]]
        if not seeds:
            continue
        cells = []
        for metrics in QUALITIES.values():
            if not all(metric in runs[seeds[0]].metrics for metric in metrics):
                cells.append("")
                continue
            own = np.array([quality_of(runs[seed], metrics) for seed in seeds])
            if name == REFERENCE:
                cells.append(f"{own.mean():.3f}")
                continue
            reference = [quality_of(found[REFERENCE][seed], metrics) for seed in seeds]
            cells.append(format_difference(own - reference, metrics))
        rows.append([name, str(len(seeds)), str(runs[seeds[0]].steps), *cells])
    return rows


def format_difference(by_seed: np.ndarray, metrics: Sequence[str]) -> str:
    """Show a mean difference with its range, and whether it is worse or better in every seed."""
    worse = by_seed if metric_of(metrics[0]).better == "lower" else -by_seed
    verdict = "worse" if (worse > 0).all() else "better" if (worse < 0).all() else "undecided"
    return f"{by_seed.mean():+.3f} ({by_seed.min():+.3f} to {by_seed.max():+.3f}), {verdict}"


if __name__ == "__main__" and not claims.run_command(study, report):
    main(VARIANTS, SWEEPS)
