"""What each part of a recipe brings, alone: choices for `claims.py`, never looked at on test.

    vlmae prepare emojivid                            # 800 MB of downloads, once
    python experiments/offline/ablations.py stills    # each of ABLATIONS, ranking stills
    python experiments/offline/ablations.py rates     # learning rates, ranking clips of val
    python experiments/offline/ablations.py merge_70  # one run

Stills of a tenth of EmojiVid's are ranked, the others trained on. Models are those of `claims.py`,
with VTC alone where the ablation does not say otherwise.

Result: docs/results.md, "What each part of a recipe brings" (merging keeps what fusing loses, for a
quarter fewer operations) and, for the learning rates, "Cost to reach dense quality".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.schema.config import SourceConfig
from experiments.offline import claims
from experiments.offline.claims import MASKED, MERGED, ONLY_VTC
from experiments.sweeps import SWEEPS
from vlmae.cli.experiment import main
from vlmae.figures.cost_to_reach import RETRIEVAL, quality_of, total_cost
from vlmae.runs.atomic_files import write_whole
from vlmae.runs.metric_registry import PRUNED
from vlmae.runs.summary import find_runs
from vlmae.runs.tables import markdown_table

STILLS = {
    "data.train": (SourceConfig("emojivid", "stills_b[:90%]", num_frames=1),),
    "data.eval": SourceConfig("emojivid", "stills_b[90%:]", num_frames=1),
    "evaluation.also_pruned": True,
}
RATIO, KEEP = "model.video.mask.ratio", "model.video.sparsify.keep_rate"
BASE = ONLY_VTC | MASKED | STILLS
# Name -> what differs from BASE, which masks 0.65.
ABLATIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "dense": {RATIO: 0.0},
    "mask_50": {RATIO: 0.5},
    "mask_75": {RATIO: 0.75},
    "mask_75_grid": {RATIO: 0.75, "model.video.mask.scheme": "grid"},
    "fuse_70": {KEEP: 0.7},
    "fuse_85": {KEEP: 0.85},
    "fuse_70_late": {KEEP: 0.7, "model.video.sparsify.stages": (3, 4, 5)},
    "fuse_70_warm": {
        KEEP: 0.7,
        "model.video.sparsify.warmup_rates": (1.0, 0.85),
        "model.video.sparsify.warmup_steps": 160,
    },
    "drop_70": {KEEP: 0.7, "model.video.sparsify.rest": "drop"},
    "merge_70": {KEEP: 0.7} | MERGED,
    "merge_85": {KEEP: 0.85} | MERGED,
    "merge_70_late": {KEEP: 0.7, "model.video.sparsify.stages": (3, 4, 5)} | MERGED,
    "merge_70_unmasked": {KEEP: 0.7, RATIO: 0.0} | MERGED,
    "px_96": {"data.image_size": 96},
    "px_96_mask_75": {"data.image_size": 96, RATIO: 0.75},
    "px_96_merge_70": {"data.image_size": 96, KEEP: 0.7} | MERGED,
    "batch_128": {"data.batch_size": 128},
    "mvm": {"objectives.mvm": 1.0},
    "mvm_20": {"objectives.mvm": 0.2},
    "mlm": {"objectives.mlm": 1.0},
    "vtm": {"objectives.vtm": 1.0},
    "all": {"objectives.mvm": 1.0, "objectives.mlm": 1.0, "objectives.vtm": 1.0},
}


def stills(
    workdir: Path = Path("runs/ablations"), steps: int = 400, seeds: tuple[int, ...] = (0, 1)
) -> None:
    """Train with each of ABLATIONS and print what it brings.

    Args:
      workdir: folder of all runs.
      steps: of each run, with a decay of its own.
      seeds: the same for all.
    """
    compare(__file__, {name: [name] for name in ABLATIONS}, workdir, steps, seeds)


def rates(
    workdir: Path = Path("runs/rates"),
    methods: tuple[str, ...] = ("dense", "masked", "all_dense", "all_smaug"),
    values: tuple[float, ...] = (0.0005, 0.001, 0.002),
    steps: int = 200,
    seeds: tuple[int, ...] = (0,),
) -> None:
    """Train methods of `claims.py` at several learning rates and print their quality on val.

    Args:
      workdir: folder of all runs.
      methods: of `claims.METHODS`.
      values: learning rates.
      steps: of each run, with a decay of its own.
      seeds: the same for all.
    """
    runs = {
        f"{name}_{value:g}": [
            name,
            *("--optim.learning-rate", str(value), "--data.eval.split", "val"),
        ]
        for name in methods
        for value in values
    }
    compare(claims.__file__, runs, workdir, steps, seeds)


def compare(
    script: str,
    runs: Mapping[str, Sequence[str]],
    workdir: Path,
    steps: int,
    seeds: Sequence[int],
) -> None:
    """Run command lines of an experiment file, then write and print a table of cost and quality.

    Args:
      script: the file.
      runs: the command line of each row, by the row's name.
      workdir: folder of all runs.
      steps: of each run.
      seeds: of each row, which shows their means.
    """
    folders = {(name, seed): workdir / name / f"seed_{seed}" for seed in seeds for name in runs}
    claims.run_missing(
        script,
        (
            [
                *runs[name],
                *("--seed", str(seed), "--train.steps", str(steps), "--workdir", str(folder)),
            ]
            for (name, seed), folder in folders.items()
        ),
    )
    found = {workdir / run.name: run for run in find_runs(workdir)}
    pruned = [f"{PRUNED}{name}" for name in RETRIEVAL["mean log rank"]]
    qualities = [*RETRIEVAL.values(), pruned]
    rows = [["ablation", "10^12 operations", *RETRIEVAL, "mean log rank, pruned"]]
    for name in runs:
        own = [found[folders[name, seed]] for seed in seeds]
        cells = []
        for metrics in qualities:
            known = all(metric in run.metrics for run in own for metric in metrics)
            cells.append(f"{np.mean([quality_of(r, metrics) for r in own]):.3f}" if known else "")
        rows.append([name, f"{total_cost(own[0], 'operations') / 1e12:.2f}", *cells])
    write_whole(workdir / "table.md", markdown_table(rows) + "\n")
    print(markdown_table(rows))


VARIANTS = {name: claims.variant(name, BASE | changes) for name, changes in ABLATIONS.items()}

if __name__ == "__main__" and not claims.run_command(stills, rates):
    main(VARIANTS, SWEEPS)
