"""Every command line that the documentation shows is accepted by its own parser."""

import ast
import contextlib
import functools
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro

from data_pipelines.storage.prepare import BUILDERS
from vlmae.cli import experiment
from vlmae.cli.main import COMMANDS, deferred, parse
from vlmae.launching.sweep_plan import choose_sweeps

ROOT = Path(__file__).parents[1]
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*TOP, *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")]
MODULES = [
    path
    for package in ("vlmae", "experiments", "data_pipelines")
    for path in (ROOT / package).rglob("*.py")
]
BEFORE = r"(?:\$ |srun |\w+=\S* )*"  # a prompt, a launcher, variables of the environment
PROGRAM = r"(?:python3? (?:-m (?:vlmae|experiments|data_pipelines)|(?:vlmae|experiments)/)|vlmae )"
COMMAND = re.compile(rf"{BEFORE}({PROGRAM}.*)")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|\.\.\.")


class Parsed(Exception):
    """Raised in place of what a parsed command line would do."""


def commands_in_text(text: str) -> Iterator[str]:
    """Yield command lines: those that begin a line or stand in inline code."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        shown = [line.strip(), *re.findall(r"`+([^`]+)`+", line)]
        for part in shown:
            for command in re.split(r"\s&&\s|\s\|\s", part):
                if found := COMMAND.fullmatch(command.strip()):
                    yield found[1]


def commands_on_page(path: Path) -> Iterator[str]:
    """Yield command lines of a page: in prose, only inline code counts."""
    for i, part in enumerate(re.split(r"^\s*```.*$", path.read_text(), flags=re.MULTILINE)):
        if i % 2:
            yield from commands_in_text(part)
        else:
            for code in re.findall(r"`([^`]+)`", part):
                yield from commands_in_text(" ".join(code.split()))


def commands_in_module(path: Path) -> Iterator[str]:
    """Yield command lines of the docstrings of a module and of all that it defines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield from commands_in_text(node.value.value)


def words_of(command: str) -> list[str]:
    """Split a command line; what is optional is given, and the first of several choices.

    A variable of the shell stands for 1: here they are all numbers.
    """
    command = re.sub(r"\$\w+", "1", command)
    command = re.sub(r"\s>\s\S+", "", command)  # a file that takes the output
    command = re.sub(r"\[(--[^\]]*)\]", r"\1", command)
    words = shlex.split(command, comments=True)
    return [word.split("|")[0] if re.fullmatch(r"\w+(\|\w+)+", word) else word for word in words]


def is_pattern(words: list[str]) -> bool:
    """Return True where the parser itself is left open: `python experiments/NAME.py`."""
    if words[0] == "vlmae":
        return len(words) < 2 or bool(PLACEHOLDER.fullmatch(words[1])) or "--help" in words
    if words[1:3] == ["-m", "vlmae"]:
        return is_pattern(["vlmae", *words[3:]])
    return any(PLACEHOLDER.fullmatch(part) for part in re.split(r"[/]|\.py$", words[1]))


def shown_commands() -> dict[str, str]:
    """Return each command line of the documentation with one file that shows it."""
    found = {c: path for path in MODULES for c in commands_in_module(path)}
    found |= {c: path for path in PAGES for c in commands_on_page(path)}
    return {
        command: str(path.relative_to(ROOT))
        for command, path in found.items()
        if not is_pattern(words_of(command))
    }


@contextlib.contextmanager
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make scripts end with `Parsed` where their command line has been understood."""
    real_cli = tyro.cli

    def run(command, sweeps):
        choose_sweeps(sweeps, [x for x in command.sweep if not PLACEHOLDER.fullmatch(x)])
        raise Parsed

    def cli(target, *args, **kwargs):
        if isinstance(target, type):
            return real_cli(target, *args, **kwargs)
        real_cli(deferred(target), *args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run", run)
        patch.setattr(experiment, "keep_freed_memory", lambda: None)
        patch.setattr(tyro, "cli", cli)
        yield


def understand(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command line, and do nothing more.

    Raises:
      SystemExit: its parser refuses it.
    """
    words = words_of(command)
    if words[:3] == ["python", "-m", "vlmae"]:
        words = ["vlmae", *words[3:]]
    if words[0] == "vlmae":
        understand_subcommand(*words[1:])
        return
    module = words[1] == "-m"
    name, arguments = (words[2], words[3:]) if module else (words[1], words[2:])
    path = ROOT / (name.replace(".", "/") + ".py" if module else name)
    assert path.is_file(), f"{command}: there is no {path}"
    source = path.read_text()
    assert re.search(r"tyro\.cli\(|from vlmae.cli.experiment import main", source), (
        f"{command}: {path} has no command line"
    )
    start = functools.partial(runpy.run_module if module else runpy.run_path, name)
    with nothing_runs(monkeypatch):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.chdir(ROOT)
        try:
            start(run_name="__main__")
        except Parsed:
            return
        except SystemExit as end:
            if end.code or "--help" not in words:
                raise
            return
    raise AssertionError(f"{command}: its command line was not read")


def understand_subcommand(name: str, *arguments: str) -> None:
    """Parse the arguments of `vlmae NAME`; the name alone is how prose speaks of a command."""
    if name == "--help":
        return
    assert name in COMMANDS, f"no command {name}"
    if not arguments:
        return
    if not COMMANDS[name].takes_arguments:
        parse(name, arguments)
        return
    module = importlib.import_module(COMMANDS[name].target.partition(":")[0])
    parsed = module.parse_args(list(arguments))
    if name == "prepare" and not PLACEHOLDER.fullmatch(arguments[0]):
        assert parsed[0] in BUILDERS, f"no data set {parsed[0]}"


SHOWN = shown_commands()


def test_commands_are_found_everywhere():
    assert len(SHOWN) > 40
    assert {"README.md", "experiments/README.md"} <= set(SHOWN.values())
    assert any(path.startswith("vlmae/") for path in SHOWN.values())


@pytest.mark.parametrize("command", [pytest.param(c, id=f"{p}: {c}") for c, p in SHOWN.items()])
def test_shown_command(command, monkeypatch):
    understand(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "vlmae status DIR --wach 3",
        "vlmae explain RUN --clip CLIP --caption CAPTION",
        "vlmae fetch nothing",
        "vlmae prepare shapes --manual-dir DIR",
        "vlmae nothing",
        "python experiments/quickstart.py --data.batchsize 3",
        "python experiments/quickstart.py --model.video.mask.ratio 2",
        "python experiments/quickstart.py --sweep nothing",
        "python experiments/nothing.py",
        "python -m experiments.benchmarks.step --no-such-flag 1",
    ],
)
def test_a_wrong_command_is_not_understood(command, monkeypatch):
    with pytest.raises((SystemExit, AssertionError)):
        understand(command, monkeypatch)


def test_what_counts_as_a_command():
    text = """
    Some `vlmae status DIR` here, no vlmae report there.

        CUDA_VISIBLE_DEVICES=0 python experiments/quickstart.py \\
            --seed 1  # a comment
        pip install x && vlmae fetch minilm
        srun python -m experiments.benchmarks.step | tee log
    """
    assert [shlex.join(words_of(c)) for c in commands_in_text(text)] == [
        "vlmae status DIR",
        "python experiments/quickstart.py --seed 1",
        "vlmae fetch minilm",
        "python -m experiments.benchmarks.step",
    ]
    assert words_of("vlmae export RUN OUT [--format torch|onnx]")[-1] == "torch"
