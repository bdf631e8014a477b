"""The last line of every experiment file: `main(get_config)`, with its sweeps if it has any."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro
from jaxtyping import PyTree

from data_pipelines.classes import Classes, classes_for
from data_pipelines.config import check
from data_pipelines.evaluation import eval_data
from data_pipelines.pipeline import train_batches
from data_pipelines.prepare import prepare
from data_pipelines.stored import open_source, tokenizer_for
from data_pipelines.tokenize import Tokenizer
from vlmae.child_process import end_with_parent
from vlmae.choices import SLOT
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override
from vlmae.evaluate import evaluate, print_tables
from vlmae.find_batch_size import find_batch_size
from vlmae.find_num_workers import find_num_workers
from vlmae.host_memory import keep_freed_memory
from vlmae.launch import LaunchConfig, LaunchedRun, launch, without_launch_flags
from vlmae.processes import Processes, is_first, leaving_at_once
from vlmae.result import write_result
from vlmae.sweep import (
    COMPLETE,
    Sweep,
    SweepRun,
    choose_sweeps,
    format_runs,
    overruled_flags,
    plan_runs,
    run_at,
    run_state,
    sweep_name,
)
from vlmae.sweep_process import errors_recorded, run_all
from vlmae.train import NonFiniteLoss, TooManyBadClips, train
from vlmae.workdir import tokenizer_of

GENERATED = ("shapes",)  # data sets that need no input, so they are made on first use

# What a user can mend: shown as one line. Anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, NonFiniteLoss, TooManyBadClips)


@dataclass(frozen=True)
class Command:
    """What the command line holds."""

    # Its fields stand at the top level: --model.video.mask.ratio, not --config.model...
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    workdir: Path | None = None
    """Config, metrics, checkpoints and results go here; None is runs/NAME. The runs of a sweep
    have a directory each in here, named by what the sweep sets."""
    sweep: str = ""
    """Sweeps of this file, separated by commas: runs their product. What a sweep sets wins over the
    same field given as a flag; all other flags hold for every run."""
    list_runs: Annotated[bool, tyro.conf.arg(name="list"), tyro.conf.FlagCreatePairsOff] = False
    """Only print the runs of the sweep and how far each is; touches nothing."""
    index: int | None = None
    """Only run this one of the sweep, counted from 0."""
    find_batch_size: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only find the largest data.batch_size that the devices hold; touches no work directory."""
    memory_gib: float = 0.0
    """Memory of each device for --find-batch-size; 0: what the device or the machine says."""
    find_num_workers: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only find the data.num_workers that make batches as fast as they are trained on."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write a trace of a few training steps to `profile` in the work directory, for xprof."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = Processes()
    launching: Annotated[LaunchConfig, tyro.conf.arg(name="")] = LaunchConfig()

    @property
    def root(self) -> Path:
        """The work directory, or that of the whole sweep."""
        return self.workdir or Path("runs") / self.config.name


def main(get_config: Callable[[], ExperimentConfig], sweeps: Sequence[Sweep] = ()) -> None:
    """Trains and evaluates an experiment, or each run of a sweep; every config field is a flag.

    An error that the user can mend (a bad field, missing data, another run's directory) ends with
    one line on stderr and exit code 1; the traceback of any error goes to `error.txt` in the work
    directory.

    Args:
      get_config: makes the experiment's config.
      sweeps: functions `sweep_NAME()` that yield overrides, see `vlmae.sweep`.
    """
    try:
        command = tyro.cli(
            Command,
            default=Command(get_config()),
            description=sys.modules[get_config.__module__].__doc__,
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:  # get_config() itself made a config that the checks refuse
        sys.exit(f"error: {error}")
    keep_freed_memory()
    with leaving_at_once():
        try:
            run(command, sweeps)
        except USER_ERRORS as error:
            sys.exit(f"error: {error}")


def run(command: Command, sweeps: Sequence[Sweep]) -> None:
    """Runs an experiment, or what is asked of it or of its sweeps."""
    check(
        command.find_batch_size or not command.memory_gib,
        "--memory-gib is only for --find-batch-size",
    )
    if command.find_batch_size or command.find_num_workers:
        run_find(command)
    elif command.sweep:
        run_sweep(command, sweeps)
    elif command.list_runs or command.index is not None:
        names = ", ".join(sweep_name(sweep) for sweep in sweeps) or "none"
        raise ValueError(f"--list and --index need --sweep NAMES; there is: {names}")
    else:
        run_single(command)


def run_single(command: Command) -> None:
    """Runs the experiment in this process, or launches it."""
    if command.launching.launch:
        launched = LaunchedRun("the run", command.root, tuple(own_command()))
        exit_unless_zero(launch(command.launching, [launched], command.root))
        return
    end_with_parent()
    command.processes.connect()
    with errors_recorded(command.root):
        run_experiment(command.config, command.root, command.profile)


def run_find(command: Command) -> None:
    """Finds the largest batch, or the number of workers, in this process.

    Raises:
      ValueError: there are flags of something else; see also what finds it.
    """
    flag = "--find-batch-size" if command.find_batch_size else "--find-num-workers"
    others = {
        "--find-num-workers": command.find_batch_size and command.find_num_workers,
        "--sweep": command.sweep,
        "--list": command.list_runs,
        "--index": command.index is not None,
        "--launch": command.launching.launch,
        "--profile": command.profile,
    }
    given = ", ".join(flag for flag, value in others.items() if value)
    check(not given, f"{flag} tries one config, in this process: not with {given}")
    check(command.memory_gib >= 0, f"--memory-gib must not be negative: {command.memory_gib}")
    command.processes.connect()
    config, _, classes = resolve(command.config)
    if command.find_batch_size:
        find_batch_size(config, command.memory_gib)
        return
    one_worker = dataclasses.replace(config.data, num_workers=1)
    with train_batches(one_worker, 0, seed=config.seed, classes=classes) as batches:
        find_num_workers(config, batches)


def own_command() -> list[str]:
    """What started this process, without the flags of a launch."""
    return [sys.executable, *without_launch_flags(sys.argv)]


def exit_unless_zero(code: int) -> None:
    """Ends this process with the exit code of what it has run, if that did not go well."""
    if code:
        sys.exit(code)


def run_sweep(command: Command, sweeps: Sequence[Sweep]) -> None:
    """Lists a sweep, or runs one of it in this process, or all of it in a process each."""
    if command.index is not None and command.launching.launch:
        raise ValueError("--launch is for the whole sweep: not with --index")
    runs = plan_runs(choose_sweeps(sweeps, command.sweep), command.root)
    chosen = runs if command.index is None else [run_at(runs, command.index)]
    if command.list_runs:
        print(format_runs(command.config, chosen))
    for field in overruled_flags(runs, sys.argv[1:]):
        print(f"note: the sweep sets {field}, so its flag is not used", file=sys.stderr)
    if command.list_runs:
        return
    if command.index is not None:
        end_with_parent()
        command.processes.connect()
        run_one(command.config, chosen[0], command.profile)
    elif command.launching.launch:
        exit_unless_zero(launch_sweep(command, runs))
    else:
        exit_unless_zero(run_all(command.config, runs, own_command()))


def launch_sweep(command: Command, runs: Sequence[SweepRun]) -> int:
    """Launches the runs that are not complete, each by its index; returns the exit code."""
    missing = [run for run in runs if run_state(command.config, run) != COMPLETE]
    print(f"sweep of {len(runs)} runs: {len(runs) - len(missing)} already complete", flush=True)
    launched = [
        LaunchedRun(
            f"run {run.index} of 0 ... {len(runs) - 1}",
            run.workdir,
            (*own_command(), "--index", str(run.index)),
        )
        for run in missing
    ]
    return launch(command.launching, launched, command.root)


def run_one(base: ExperimentConfig, run: SweepRun, profile: bool = False) -> None:
    """Runs one of a sweep, unless it is complete."""
    run.workdir.mkdir(parents=True, exist_ok=True)  # even a refused config leaves its error there
    with errors_recorded(run.workdir):
        if run_state(base, run) == COMPLETE:
            print(f"already complete: {run.workdir}")
        else:
            run_experiment(override(base, run.changes), run.workdir, profile)


def run_experiment(
    config: ExperimentConfig, workdir: Path, profile: bool = False
) -> dict[str, float]:
    """Prepares what can be generated, resolves the config, trains, and evaluates.

    The last file it writes is `result.json`: where that is, the run is complete.

    Args:
      config: the experiment.
      workdir: where everything goes.
      profile: see `train`.

    Returns:
      The metrics of the final evaluation.
    """
    config, tokenizer, classes = resolve(config)
    data = eval_data(config.data, classes)

    def evaluate_params(
        params: PyTree, mesh: jax.sharding.Mesh, on_progress: Callable[[], None]
    ) -> dict[str, float]:
        return evaluate(config, params, mesh, data, workdir, on_progress)

    def make_batches(start_step: int, part: int, parts: int):
        if is_first():
            tokenizer.save(workdir / "tokenizer")
        if is_first() and classes:
            classes.save(workdir)
        return train_batches(
            config.data,
            start_step,
            seed=config.seed,
            classes=classes,
            part=part,
            parts=parts,
        )

    result = train(config, workdir, make_batches, evaluate_params, profile)
    if is_first():
        write_result(workdir, config.train.steps, result, config.data.batch_size)
        print_tables(workdir)
        print(f"results, metrics and pictures are in {workdir}")
    return result


def resolve(config: ExperimentConfig) -> tuple[ExperimentConfig, Tokenizer, Classes | None]:
    """Prepares what can be generated, and fills in what the data decide: vocabulary and classes.

    Raises:
      FileNotFoundError, ValueError: the data are not there, or contradict the config.
    """
    for source in (*config.data.train, config.data.eval):
        if source.name in GENERATED:
            prepare(source.name, config.data.data_dir)
    for source in config.data.train:
        open_source(source, config.data.data_dir)  # a missing split shows now, not after compiling
    config = with_source_tokenizer(config)
    tokenizer, classes = tokenizer_for(config.data), classes_for(config.data)
    config = with_vocabulary(config, tokenizer)
    return with_classes(config, classes) if classes else config, tokenizer, classes


def with_vocabulary(config: ExperimentConfig, tokenizer: Tokenizer) -> ExperimentConfig:
    """Takes vocabulary size, special ids and the ids of MCM's template from the tokenizer.

    Raises:
      ValueError: the config asks for a vocabulary that is too small for the tokenizer.
    """
    wanted, size = config.model.text.vocab_size, tokenizer.vocab_size
    if wanted and wanted < size:
        raise ValueError(f"model.text.vocab_size={wanted}, but the tokenizer has {size} words")
    filled = {
        "model.text.vocab_size": wanted or size,
        "model.text.cls_id": tokenizer.cls_id,
        "model.text.mask_id": tokenizer.mask_id,
    }
    if config.objectives.mcm:
        template = tokenizer.encode_template(config.objectives.mcm_template, SLOT)
        filled["objectives.mcm_template_ids"] = template
    return override(config, filled)


def with_source_tokenizer(config: ExperimentConfig) -> ExperimentConfig:
    """Takes the tokenizer of what the parameters come from, unless another is given.

    By any other tokenizer words would have other meanings. That there is such a run is checked
    where its parameters are read.
    """
    train = config.train
    if config.data.tokenizer or not (train.init_from or train.init.text):
        return config
    if train.init.text:
        from vlmae.interop.published import find  # safetensors, only where it is needed

        return override(config, {"data.tokenizer": str(find(train.init.text))})
    source = Path(train.init_from).expanduser()
    if not source.is_dir():
        return config
    return override(config, {"data.tokenizer": str(tokenizer_of(source))})


def with_classes(config: ExperimentConfig, classes: Classes) -> ExperimentConfig:
    """Takes the number of classes from the data.

    Raises:
      ValueError: the config asks for another number.
    """
    wanted, found = config.model.num_classes, len(classes.names)
    if wanted not in (0, found):
        raise ValueError(f"model.num_classes={wanted}, but the data have {found} classes")
    return override(config, {"model.num_classes": found})
