"""One command for everything but training: `vlmae COMMAND`, or `python -m vlmae COMMAND`."""

import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from data_pipelines.schema.checks import UserError
from vlmae.parallel.exit_codes import raise_at_ctrl_c


class Command(NamedTuple):
    """A function that is a subcommand, imported only when it is called."""

    target: str
    """module:function."""
    help: str
    takes_arguments: bool = False
    """True if the function reads the list of arguments itself; else its parameters are flags."""

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)


# Names only: importing a command takes seconds, and --help shows them all.
COMMANDS = {
    "prepare": Command("data_pipelines.storage.prepare:main", "prepare a data set", True),
    "fetch": Command("data_pipelines.offline.fetch:main", "download data or weights", True),
    "evaluate": Command("vlmae.evaluation.evaluate:evaluate_workdir", "evaluate a run again"),
    "explain": Command("vlmae.figures.explain:explain", "draw what a run does with one clip"),
    "search": Command("vlmae.search.command:search_folder", "search a folder of videos by text"),
    "export": Command("vlmae.export.command:export", "write a run for PyTorch, StableHLO or ONNX"),
    "weights": Command(
        "vlmae.weights.command:describe", "print the config fields that published weights need"
    ),
    "status": Command("vlmae.launching.status:status", "progress of all runs below a folder"),
    "report": Command("vlmae.figures.sweep_report:report", "tables and plots of a sweep"),
    "compile": Command(
        "vlmae.training.compile_for:compile_command",
        "memory and cost of a training step on GPUs that are not here",
    ),
    "operations": Command("vlmae.training.operations:show", "FLOPs of a training step, by part"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; a mistake of the user's ends with one line on stderr and exit code 1."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        # As tyro does for flags.
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; perhaps you meant {close[0]!r}" if close else ""
        sys.exit(f"error: no command {name!r}{hint}\n\n{usage()}")
    raise_at_ctrl_c()
    try:
        run = parse(name, rest)
        if "jax" in sys.modules:  # a command that computes
            from vlmae.parallel.compile_cache import keep_programs

            keep_programs()
        code = run()
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(code if isinstance(code, int) else 0)  # other results are for Python


def parse(name: str, arguments: Sequence[str]) -> Callable[[], Any]:
    """Read the arguments of a subcommand; the result runs it.

    Raises:
      SystemExit: an argument is wrong, or the help was asked for.
    """
    function = COMMANDS[name].load()  # of this command alone: importing jax takes seconds
    if COMMANDS[name].takes_arguments:
        return functools.partial(function, list(arguments))
    import tyro  # slower to import than all that `vlmae --help` needs

    options = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    return tyro.cli(deferred(function), prog=f"vlmae {name}", args=list(arguments), config=options)


def deferred(function: Callable[..., Any]) -> Callable[..., functools.partial]:
    """Make a function of the same parameters and docstring that returns its call as a partial.

    `tyro.cli` on it parses and runs nothing.
    """

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> functools.partial:
        return functools.partial(function, *args, **kwargs)

    return bind


def usage() -> str:
    """List the commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    training = "Training is a file of its own: python experiments/quickstart.py --help"
    return "\n".join(["usage: vlmae COMMAND [--help] ...", "", *lines, "", training])


if __name__ == "__main__":
    main()
