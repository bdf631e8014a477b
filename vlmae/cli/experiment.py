"""The last line of every experiment file: `main(get_config)` or `main({"variant": get_config})`."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence

from data_pipelines.loading.pipeline import train_batches
from data_pipelines.schema.checks import MissingError, UserError
from vlmae.cli.options import Command, GetConfig, parse
from vlmae.cli.run_experiment import resolve, run_experiment
from vlmae.config.epochs import change
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.phases import Segment, segments
from vlmae.launching.child_process import end_with_parent
from vlmae.launching.launch import LAUNCHER, launch, without_launch_flags
from vlmae.launching.submission import LaunchedRun
from vlmae.launching.sweep_plan import (
    COMPLETE,
    Sweep,
    SweepRun,
    check_typed,
    choose_sweeps,
    format_runs,
    overruled_flags,
    plan_runs,
    run_at,
    run_state,
)
from vlmae.launching.sweep_run import errors_recorded, run_all
from vlmae.parallel.compile_cache import keep_programs
from vlmae.parallel.exit_codes import raise_at_ctrl_c
from vlmae.parallel.gpu_settings import take_gpu_memory
from vlmae.parallel.malloc import keep_freed_memory
from vlmae.parallel.processes import abort_without_barrier
from vlmae.runs.owner import own
from vlmae.training.batch_size import find_batch_size
from vlmae.training.compile_for import with_defaults
from vlmae.training.gpus import parse_target
from vlmae.training.num_workers import find_num_workers


def main(get_config: GetConfig | Mapping[str, GetConfig], sweeps: Sequence[Sweep] = ()) -> None:
    """Train and evaluate an experiment, or each run of a sweep; every config field is a flag.

    A mistake of the user's (a bad field, missing data, another run's directory) ends with one line
    on stderr and exit code 1. The traceback of any error goes to `error.txt` in the work directory.

    Args:
      get_config: makes the experiment's config; or a table of variants, of which the first
        argument of the command line names one.
      sweeps: functions `sweep_NAME()` that yield overrides, see `vlmae.launching.sweep_plan`.
    """
    # Around everything: once connected, the other processes wait for this one.
    with abort_without_barrier():
        try:
            command = parse(get_config, sweeps)
            keep_freed_memory()  # before jax looks for devices
            take_gpu_memory()
            exit_code = run(command, sweeps)
        except UserError as error:
            sys.exit(f"error: {error}")
    if exit_code:
        sys.exit(exit_code)


def run(command: Command, sweeps: Sequence[Sweep]) -> int:
    """Do the one thing that a command line asks for; returns the exit code."""
    if command.index is None and (command.sweep or command.launching.launch):
        raise_at_ctrl_c()  # which the runs hear of from here
    # A sweep first: all other requests hold for each of its runs.
    if command.sweep:
        return run_sweep(command, sweeps)
    if command.print_config:
        print_config(command.config)
    elif command.find_batch_size:
        command.processes.connect()
        search_batch_size(command)
    elif command.find_num_workers:
        measure_workers(command)
    elif command.launching.launch:
        launched = LaunchedRun("the run", command.root, tuple(own_command()))
        return launch(command.launching, [launched], command.root)
    else:
        run_here(command)
    return 0


def print_config(config: ExperimentConfig) -> None:
    """Print a config as the JSON that `load_config` reads."""
    print(json.dumps(dataclasses.asdict(config), indent=2))


def search_batch_size(command: Command) -> None:
    """Find the largest batch for the devices that are here, or for described ones."""
    target = parse_target(command.target) if command.target else None
    try:
        # Data decide the sizes of embedding and classifier, which change the memory of a step.
        config, _, _ = resolve(command.config)
    except MissingError:
        if target is None:
            raise
        config = with_defaults(command.config)  # a laptop need not have the data
        print(f"no data here: a vocabulary of {config.model.text.vocab_size:,} words is assumed")
    find_batch_size(config, command.memory_gib, target)


def measure_workers(command: Command) -> None:
    """Find the number of data workers that keeps up with a training step."""
    command.processes.connect()
    config, _, classes = resolve(command.config)
    # Of several phases, the one whose steps are the fastest waits first.
    config = min(segments(config), key=Segment.visible_patches).config
    # The time of one worker tells how many keep up with the step.
    one_worker = dataclasses.replace(config.data, num_workers=1)
    with train_batches(one_worker, 0, seed=config.seed, classes=classes) as batches:
        find_num_workers(config, batches)


def run_here(command: Command, run: SweepRun | None = None) -> None:
    """Run the experiment, or one run of its sweep, in this process, unless it is complete."""
    end_with_parent()  # does nothing unless a sweep or a launcher started this process
    command.processes.connect()
    keep_programs()
    workdir = run.workdir if run else command.root
    if run:
        workdir.mkdir(parents=True, exist_ok=True)  # a refused config leaves its error there
    # Around everything: a run of a sweep has no terminal that anyone reads.
    with errors_recorded(workdir):
        is_back = command.resume_step is not None
        if run and not is_back and run_state(command.config, run) == COMPLETE:
            print(f"already complete: {workdir}")
            return
        # Inside of it, as an override may be refused, too.
        config = change(command.config, run.changes) if run else command.config
        run_experiment(config, workdir, command.profile, command.resume_step)


def run_sweep(command: Command, sweeps: Sequence[Sweep]) -> int:
    """List a sweep, print the config of a run, run one, run all or launch all.

    Returns:
      The exit code.
    """
    # Planned before anything starts: a sweep that contradicts itself is refused as a whole.
    runs = plan_runs(choose_sweeps(sweeps, command.sweep), command.root)
    check_typed(command.config, runs, command.sweep)
    chosen = runs if command.index is None else [run_at(runs, command.index)]
    for field in overruled_flags(runs, sys.argv[1:]):
        print(f"note: the sweep sets {field}, so its flag is not used", file=sys.stderr)
    if command.list_runs:
        print(format_runs(command.config, chosen))
    elif command.print_config:
        for run in chosen:
            print_config(change(command.config, run.changes))
    elif command.index is not None:
        run_here(command, chosen[0])
    elif command.launching.launch:
        return launch_sweep(command, runs)
    else:
        with own(command.root, LAUNCHER):
            return run_all(command.config, runs, own_command())
    return 0


def launch_sweep(command: Command, runs: Sequence[SweepRun]) -> int:
    """Launch the runs that are not complete, each by its index; returns the exit code."""
    # By files, not by jobs: what another machine has finished counts.
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


def own_command() -> list[str]:
    """Return the command line of this process without its launch flags."""
    return [sys.executable, *without_launch_flags(sys.argv)]
