"""The command `vlmae`: its help, its subcommands' help, and what it does with a wrong name."""

import inspect
import os
import re
import subprocess
import sys

import pytest

from vlmae.cli.main import COMMANDS, Command, main, parse


def test_the_list_of_commands_needs_nothing_heavy():
    code = (
        "import sys; from vlmae.cli.main import main; main(['--help'])\n"
        "print([name for name in ('jax', 'tyro', 'numpy') if name in sys.modules])"
    )
    before = os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert os.times().children_user - before < 0.5


@pytest.mark.parametrize("name", ["status", "report"])
def test_what_reads_files_alone_does_not_wait_for_jax(name, tmp_path):
    """Half a second, of which tyro takes a part."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "error.txt").write_text("UserError: refused")
    code = (
        f"import sys; from vlmae.cli.main import parse; parse({name!r}, [{str(tmp_path)!r}])()\n"
        "heavy = ('jax', 'scipy', 'orbax', 'grain', 'flax', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if not c.takes_arguments])
def test_help_names_and_explains_every_argument(name, capsys):
    with pytest.raises(SystemExit) as end:
        parse(name, ["--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert f"usage: vlmae {name}" in text
    function = COMMANDS[name].load()
    explained = re.findall(r"^  (\w+): ", inspect.getdoc(function), flags=re.MULTILINE)
    for argument in inspect.signature(function).parameters:
        assert argument in explained
        dashed = argument.replace("_", "-")
        assert re.search(rf"^\W*(--{dashed}|{dashed.upper()})\b", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if c.takes_arguments])
def test_commands_that_parse_for_themselves_have_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert not end.value.code
    assert f"usage: vlmae {name}" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_a_suggestion():
    with pytest.raises(SystemExit) as end:
        main(["serch"])
    assert "'serch'" in end.value.code and "'search'" in end.value.code


def test_parsing_runs_nothing(tmp_path):
    call = parse("status", [str(tmp_path / "none"), "--watch", "2"])
    with pytest.raises(ValueError, match="none"):
        call()


def test_a_mistake_of_the_user_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["status", str(tmp_path / "none")])
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "broken_tool.py").write_text(
        "def tool(n: int) -> None:\n"
        '    """Break.\n\n    Args:\n      n: any.\n    """\n'
        "    raise ValueError('operands could not be broadcast together')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "broken", Command("broken_tool:tool", ""))
    with pytest.raises(ValueError, match="broadcast"):
        main(["broken", "3"])
