"""The command line of an experiment: every field of its config is a flag, and so is its launch."""

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.fields import check_config, checks_deferred
from vlmae.config.epochs import overruled
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.launching.submission import LaunchConfig
from vlmae.launching.sweep_plan import Sweep, named_fields, sweep_name
from vlmae.parallel.processes import Processes

GetConfig = Callable[..., ExperimentConfig]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # --flag, without a --no-flag beside it


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    # Without a name its fields stand at the top: --model.video.mask.ratio, not --config.model...
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    dataset: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Prepared data set to train and evaluate on: the name of the only training source."""
    workdir: Path | None = None
    """Folder for config, metrics, checkpoints and results; None is runs/NAME. Each run of a sweep
    has a folder of its own in here, named by the fields that the sweep sets."""
    sweep: tuple[str, ...] = ()
    """Sweeps of this file by name, and values of fields (seed=0,1,2 optim.learning-rate=1e-4,3e-4):
    runs their product. A field that a sweep sets wins over its flag; all other flags hold for every
    run."""
    list_runs: Annotated[Switch, tyro.conf.arg(name="list")] = False
    """Print the runs of the sweep and how far each is, and end."""
    index: int | None = None
    """Run only this run of the sweep, counted from 0."""
    print_config: Switch = False
    """Print the config as JSON (of a sweep's run with --index) and end."""
    find_batch_size: Switch = False
    """Find the largest --data.batch-size that the devices hold, and end."""
    memory_gib: float = 0.0
    """Memory of each device for --find-batch-size; 0 asks the device or the machine."""
    target: Annotated[str, tyro.conf.arg(name="for")] = ""
    """GPUs that need not be here, for --find-batch-size: h100, a100, a6000, l4, or several, 8xh100
    of one node, 2x8xh100 of two."""
    find_num_workers: Switch = False
    """Find the --data.num-workers that make batches as fast as they are trained on, and end."""
    profile: Switch = False
    """Write a profile of a few training steps to `profile` in the work directory, for xprof."""
    resume_step: int | None = None
    """Go on from the checkpoint of this step; later ones are moved to `set_aside` in the work
    directory."""
    # Prefixes are left out, but each has a box of its own in the help, after data and model.
    processes: Annotated[Processes, tyro.conf.OmitArgPrefixes] = Processes()
    launching: Annotated[LaunchConfig, tyro.conf.OmitArgPrefixes] = LaunchConfig()

    @property
    def root(self) -> Path:
        """The work directory, or the folder of the whole sweep."""
        return self.workdir or Path("runs") / self.config.name


def parse(
    get_config: GetConfig | Mapping[str, GetConfig],
    sweeps: Sequence[Sweep] = (),
    arguments: Sequence[str] | None = None,
) -> Command:
    """Read a command line; touch nothing.

    Args:
      get_config: makes the config whose values are the defaults; or a table of variants, of which
        the first argument names one. The variant "" needs no name.
      sweeps: the sweeps that the experiment offers.
      arguments: of the command line; None takes this process's.

    Raises:
      UserError: a value is out of its range, or flags contradict each other; names them.
      SystemExit: a flag is unknown or of another type, or the help was asked for.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(get_config, Mapping):
        get_config, arguments = choose_variant(get_config, arguments)
    names = ", ".join(map(sweep_name, sweeps)) or "none"
    # The file's own docstring heads its help: setting, command, result.
    docs = (inspect.getdoc(sys.modules[get_config.__module__]), inspect.getdoc(get_config))
    default = Command(default_config(get_config, arguments))
    with checks_deferred():  # tyro makes nested configs first, which do not know their flags
        command = tyro.cli(
            Command,
            args=arguments,
            default=default,
            description="\n\n".join([*filter(None, docs), f"Sweeps: {names}."]),
            config=(tyro.conf.AvoidSubcommands,),
        )
    # Now, when all flags are known: messages name them as they are typed.
    for part in (command.config, command.processes, command.launching):
        check_config(part)
    check_action(command)
    unswept = "--list" if command.list_runs else "--index" if command.index is not None else ""
    check(
        bool(command.sweep) or not unswept,
        f"{unswept} needs --sweep NAMES, of {names}, or --sweep FIELD=VALUE,VALUE",
    )
    return command


def choose_variant(
    variants: Mapping[str, GetConfig], arguments: Sequence[str]
) -> tuple[GetConfig, list[str]]:
    """Split a command line into the variant that its first argument names, and the flags.

    Without such an argument it is the variant "", if there is one. `--help` alone prints the file's
    docstring with the names, and exits, unless there is.

    Raises:
      UserError: no variant is named, or an unknown one.
    """
    name, *flags = [*arguments] or [""]
    if name in variants:
        return variants[name], flags
    if "" in variants and name.startswith("-"):
        return variants[""], [name, *flags]
    names = ", ".join(filter(None, variants))
    # Without a variant there is no config to show flags of.
    if name in ("-h", "--help"):
        print(sys.modules[next(iter(variants.values())).__module__].__doc__)
        print(f"Variants: {names}. VARIANT --help lists the flags.")
        sys.exit()
    raise UserError(f"the first argument names a variant, not {name!r}; there is: {names}")


def default_config(get_config: GetConfig, arguments: Sequence[str]) -> ExperimentConfig:
    """Return the config whose values hold where no flag says otherwise.

    `--data NAME` chooses the data set. A length in steps (`--train.steps`) counts, whatever epochs
    the experiment states.

    Raises:
      UserError: `--data` and several training sources, or a length is given both ways.
    """
    name = value_of("data", arguments)
    if name and "data" in inspect.signature(get_config).parameters:
        # Experiments that fit themselves to the data, wherever these lie.
        where = value_of("data.data_dir", arguments)
        config = get_config(data=name, **({"data_dir": where} if where else {}))
    else:
        config = get_config()
        if name:
            sources = [source.name for source in config.data.train]
            check(
                len(sources) == 1,
                f"--data names one training source, and there are {', '.join(sources)}: name them "
                "by --data.train.0.name and so on",
            )
            config = override(config, {"data.train.0.name": name})
    unset = overruled(named_fields(arguments))
    return override(config, unset) if unset else config


def value_of(field: str, arguments: Sequence[str]) -> str:
    """Return what a command line gives to a field, the last time that it names it; empty: nothing.

    >>> value_of("data.data_dir", ["--data.data-dir=a", "--data", "b"])
    'a'
    """
    found = ""
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") == field:
            found = value if equals else following
    return found


def check_action(command: Command) -> None:
    """Check that the flags ask for one thing.

    Raises:
      UserError: flags exclude each other, or need one that is not given; names them.
    """
    check(command.memory_gib >= 0, f"--memory-gib must be at least 0, not {command.memory_gib}")
    check(
        command.find_batch_size or not command.memory_gib,
        "--memory-gib is only for --find-batch-size",
    )
    check(command.find_batch_size or not command.target, "--for is only for --find-batch-size")
    check(
        command.index is None or not command.launching.launch,
        "--launch is for the whole sweep: not with --index",
    )
    # A job that is queued again would go back again.
    check(
        command.resume_step is None
        or not (command.launching.launch or (command.sweep and command.index is None)),
        "--resume-step is for one run in this process: not with --launch, nor with --sweep without "
        "--index",
    )
    given = {
        "--find-batch-size": command.find_batch_size,
        "--find-num-workers": command.find_num_workers,
        "--sweep": bool(command.sweep),
        "--list": command.list_runs,
        "--index": command.index is not None,
        "--launch": bool(command.launching.launch),
        "--profile": command.profile,
        "--resume-step": command.resume_step is not None,
    }
    names = [name for name, value in given.items() if value]
    for finder in ("--find-batch-size", "--find-num-workers"):
        others = ", ".join(name for name in names if name != finder)
        check(
            finder not in names or not others,
            f"{finder} tries one config, in this process: not with {others}",
        )
