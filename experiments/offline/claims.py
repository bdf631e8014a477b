"""The papers' claim on EmojiVid: dense training's quality at a fraction of its cost.

    vlmae prepare emojivid                                # 800 MB of downloads, once
    python experiments/offline/claims.py study            # all runs; the same command resumes
    python experiments/offline/claims.py report           # figure, table, cost_to_reach.json
    python experiments/offline/claims.py masked --seed 1  # one run of one method

Protocol B of `smaug_emojivid_pretrain.py`: clips and stills alternate, 220 clips of unseen emoji
families are ranked. The video encoder (96 wide, 6 blocks) costs far more than the text encoder (64
wide, 1 layer), as in the papers.

Criterion, fixed before the runs: the cost of a method to reach dense training's quality, in
operations and in seconds of steps, is at least 1.9 times lower in every seed; the aim for the best
method is 5. Quality is the mean log rank, InfoNCE at its best temperature, MRR and R@10 on test,
each the mean of both directions. Dense's quality is that of its longest run with the same seed.
Every length has a decay of its own: a trunk at constant rate, and branches that decay in the last
fifth. Seconds are those of a step, measured for all methods in one sitting, times the steps, since
runs that share a machine slow one another.

Results: docs/results.md, "Cost to reach dense quality" and the same with all objectives.
"""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from data_pipelines.schema.config import SourceConfig
from experiments.benchmarks.cost import compile_step, one_device, time_step
from experiments.offline.smaug_emojivid_pretrain import get_config as get_emojivid
from experiments.sweeps import SWEEPS
from vlmae.cli.experiment import main
from vlmae.config.experiment import ExperimentConfig, PhaseConfig
from vlmae.config.tree import override
from vlmae.figures.cost_to_reach import total_cost, write_reach
from vlmae.parallel.sharding import put_batch
from vlmae.runs.atomic_files import write_json
from vlmae.runs.summary import Run, find_runs
from vlmae.training.step import abstract_batch, random_batch

VOCAB_SIZE = 2048  # for random data; about that of EmojiVid's tokenizer
BASE = {
    "model.video.depth": 6,
    "model.video.sparsify.stages": (1, 3, 5),
    "model.text.width": 64,
    "model.text.depth": 1,
    "model.text.num_heads": 2,
    "model.text.mlp_dim": 256,
    "objectives.vtm_hardness": 0.0,  # hard negatives teach nothing in runs of this length
    "optim.warmup_steps": 60,
    "evaluation.pictures": 0,
    "train.log_every_steps": 60,
    "train.eval_every_steps": 0,
    "train.save_every_steps": 10_000,
}
ONLY_VTC = {"objectives.vtm": 0.0, "objectives.mlm": 0.0, "objectives.mvm": 0.0}
DENSE = {"model.video.mask.ratio": 0.0, "objectives.mvm": 0.0}
MASKED = {"model.video.mask.ratio": 0.65}
SMALL = {"data.image_size": 48}  # evaluated at that size too
MERGED = {"model.video.sparsify.rest": "merge"}
UNMASKED_END = {"train.phases": (PhaseConfig(share=0.9), PhaseConfig(share=0.1, mask_ratio=0.0))}
SMAUG = MASKED | {
    "model.video.sparsify.keep_rate": 0.7,
    "model.selector.kind": "mlp",
    "model.pixel_decoder.target_ratio": 0.5,
    "evaluation.also_pruned": True,
}

METHODS: dict[str, dict[str, Any]] = {
    "dense": ONLY_VTC | DENSE,
    "small": ONLY_VTC | DENSE | SMALL,
    "masked": ONLY_VTC | MASKED,
    "masked_small": ONLY_VTC | MASKED | SMALL,
    "masked_unmasked_end": ONLY_VTC | MASKED | UNMASKED_END,  # branches off the trunk of `masked`
    "all_dense": DENSE,
    "all_masked": MASKED,
    "all_smaug": SMAUG,
    "all_smaug_small": SMAUG | SMALL,
    "all_merged": SMAUG | MERGED,
    "all_merged_small": SMAUG | MERGED | SMALL,
}

TRUNKS = {"masked_unmasked_end": "masked"}  # method -> the one that it branches off, if another


def variant(name: str, changes: Mapping[str, Any]) -> Callable[[], ExperimentConfig]:
    """Return a changed config as the function that an experiment's command line takes."""

    def get_config() -> ExperimentConfig:
        return override(get_emojivid(), {**BASE, **changes, "name": name})

    return get_config


VARIANTS = {name: variant(f"claims_{name}", changes) for name, changes in METHODS.items()}


def commands(
    workdir: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    shortest: int,
    doublings: Mapping[bool, int],
) -> Iterator[list[str]]:
    """List the command lines of the study: of each seed and method the trunk, then its branches.

    `doublings` of the length `shortest` are those of dense methods (True) and of all others.
    """
    for seed in seeds:
        for name in methods:
            dense = name in ("dense", "all_dense")
            lengths = [shortest * 2**i for i in range(doublings[dense] + 1)]
            starts = [length * 4 // 5 for length in lengths]  # of the decay
            common = ["--seed", str(seed), "--optim.schedule", "wsd"]
            trunk = workdir / TRUNKS.get(name, name) / f"seed_{seed}" / "trunk"
            yield [
                TRUNKS.get(name, name),
                *common,
                *("--workdir", str(trunk), "--train.steps", str(starts[-1])),
                *("--optim.decay-share", "0", "--train.save-every-steps", str(starts[0])),
                *("--train.keep-checkpoints", str(starts[-1] // starts[0])),
            ]
            for start, length in zip(starts, lengths, strict=True):
                folder = workdir / name / f"seed_{seed}" / f"steps_{length}"
                yield [
                    name,
                    *common,
                    *("--workdir", str(folder), "--train.steps", str(length)),
                    *("--train.init-from", str(trunk), "--train.init-step", str(start)),
                ]


def run_missing(script: str, commands: Iterable[Sequence[str]]) -> None:
    """Run command lines of an experiment file one after another; complete runs are passed over.

    Raises:
      SystemExit: a run failed, with its exit code.
    """
    for command in commands:
        folder = Path(command[command.index("--workdir") + 1])
        if (folder / "result.json").exists():
            continue
        print(f"--- {folder}", flush=True)
        ended = subprocess.run([sys.executable, script, *command], check=False)
        if ended.returncode:
            sys.exit(ended.returncode)


def study(
    workdir: Path = Path("runs/claims"),
    methods: tuple[str, ...] = ("dense", "masked", "masked_small", "small"),
    seeds: tuple[int, ...] = (0, 1, 2),
    shortest: int = 250,
    dense_doublings: int = 1,
    sparse_doublings: int = 2,
) -> None:
    """Run all runs of the study, each in a process of its own; complete ones are passed over.

    Args:
      workdir: folder of all runs; two processes may share it if they have other methods or seeds.
      methods: of METHODS.
      seeds: the same for all methods, which are compared within a seed.
      shortest: steps of the shortest runs, a multiple of 5.
      dense_doublings: doublings of that length for dense methods.
      sparse_doublings: doublings of that length for all others.
    """
    doublings = {True: dense_doublings, False: sparse_doublings}
    run_missing(__file__, commands(workdir, methods, seeds, shortest, doublings))


def step_seconds(names: Sequence[str], rounds: int = 5) -> dict[str, float]:
    """Measure the seconds of a step of each method, the mean over clips and stills as trained on.

    A round runs one step of every method on every source; the fastest of the rounds counts.
    """
    runs = [
        (name, source.weight, prepare_step(VARIANTS[name](), source))
        for name in names
        for source in VARIANTS[name]().data.train
    ]
    best = np.min([[run() for *_, run in runs] for _ in range(rounds)], axis=0)
    totals: dict[str, list[float]] = {name: [0.0, 0.0] for name in names}
    for (name, weight, _), secs in zip(runs, best, strict=True):
        totals[name][0] += weight * secs
        totals[name][1] += weight
    return {name: secs / weight for name, (secs, weight) in totals.items()}


def prepare_step(config: ExperimentConfig, source: SourceConfig) -> Callable[[], float]:
    """Compile a step on random data; return a function that runs it and gives its seconds."""
    config, mesh = override(config, {"model.text.vocab_size": VOCAB_SIZE}), one_device()
    batch = put_batch(random_batch(abstract_batch(config, source), VOCAB_SIZE), mesh)
    return functools.partial(time_step, compile_step(config, mesh, batch), batch)


def report(workdir: Path = Path("runs/claims"), reference: str = "dense", rounds: int = 5) -> None:
    """Measure a step of each method, then write the figure and tables and print one.

    Args:
      workdir: folder of the study, to which the files of `write_reach` go.
      reference: method whose quality the others are to reach.
      rounds: of measuring, see `step_seconds`.
    """
    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    for run in find_runs(workdir):
        runs[run.title.removeprefix("claims_")].append(run)
    names = [name for name, found in runs.items() if found]
    seconds = step_seconds(names, rounds)
    write_json(workdir / "step_seconds.json", seconds)
    write_costs(runs, seconds, reference, workdir)
    print((workdir / "cost_to_reach.md").read_text())


def write_costs(
    runs: Mapping[str, Sequence[Run]], seconds: Mapping[str, float], reference: str, out: Path
) -> None:
    """Write figure and tables of the runs of each method, from the seconds of a step of each."""
    by_title = {label(name): secs for name, secs in seconds.items()}

    def cost_of(run: Run, cost: str) -> float:
        return run.steps * by_title[run.title] if cost == "seconds" else total_cost(run, cost)

    titled = [
        dataclasses.replace(run, title=label(name)) for name, found in runs.items() for run in found
    ]
    write_reach(titled, label(reference), (), out, cost_of)


def label(method: str) -> str:
    """Name a method in a figure or table."""
    return method.replace("_", " ")


def run_command(*commands: Callable[..., None]) -> bool:
    """Run the command that the first argument names; False if it names none of them."""
    chosen = [command for command in commands if sys.argv[1:2] == [command.__name__]]
    for command in chosen:
        tyro.cli(command, args=sys.argv[2:])
    return bool(chosen)


if __name__ == "__main__" and not run_command(study, report):
    main(VARIANTS, SWEEPS)
