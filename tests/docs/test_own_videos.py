"""The files and commands of docs/guide/own-videos.md, section by section.

By default all files are prepared, and every recipe is resolved with them; `-m slow` trains and
evaluates each at a tiny size, in the order of the page.
"""

import csv
import re
import runpy
import sys
from pathlib import Path

import clips
import pytest

from experiments.benchmarks.journey import commands_of
from vlmae.cli import experiment
from vlmae.cli import main as commands
from vlmae.cli.run_experiment import resolve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guide" / "own-videos.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
TASKS = ("Captions", "Questions", "Options", "Labels")
CLIPS = 10
TINY = """
    --train.steps 2 --train.log-every-steps 1 --data.image-size 16 --data.num-workers 0
    --model.video.width 16 --model.video.depth 1 --model.video.num-heads 2 --model.video.mlp-dim 32
    --model.text.width 16 --model.text.depth 1 --model.text.num-heads 2 --model.text.mlp-dim 32
    --model.pixel-decoder.width 16 --model.embed-dim 8 --evaluation.pictures 0
""".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as the page has it: the tables, continued in their manner, and their clips."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    for i in range(1, CLIPS + 1):
        times = range(0, 40 * (4 + i), 40)
        Path(f"clips/{i}.mp4").write_bytes(clips.write_clip(list(times)))
    for name, text in re.findall(r'```csv title="(.*?)"\n(.*?)```', PAGE, re.DOTALL):
        header, *rows = csv.reader(text.splitlines())
        shown = {row[0] for row in rows}
        further = [f"clips/{i}.mp4" for i in range(1, CLIPS + 1)]
        rows += [[x, *rows[i % len(rows)][1:]] for i, x in enumerate(further) if x not in shown]
        with open(name, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    return tmp_path


def run(words: list[str], monkeypatch) -> None:
    """Run a command line of the page in this process."""
    if words[0] == "vlmae":
        with pytest.raises(SystemExit) as end:
            commands.main(words[1:])
            raise SystemExit(0)  # of a command that does not exit by itself
        assert not end.value.code, end.value.code
        return
    monkeypatch.setattr(sys, "argv", words[1:])
    runpy.run_path(str(ROOT / words[1]), run_name="__main__")


def test_every_task_has_its_file_and_at_most_three_commands():
    for section in TASKS:
        assert 'csv title="' in SECTIONS[section] and 1 < len(commands_of(PAGE, section)) <= 3


@pytest.mark.e2e
@pytest.mark.parametrize("section", TASKS)
def test_files_are_prepared_and_recipes_fit_them(folder, monkeypatch, section):
    configs = []
    monkeypatch.setattr(experiment, "run", lambda command, _: configs.append(command.config))
    monkeypatch.setattr(experiment, "keep_freed_memory", lambda: None)
    for words in commands_of(PAGE, section):
        # Runs of other sections are not there: what they have trained is not needed here.
        run(words[: words.index("--train.init-from")] if "--train.init-from" in words else words,
            monkeypatch)  # fmt: skip
    assert len(configs) == len(commands_of(PAGE, section)) - 1
    for config in configs:
        config, _, _ = resolve(config)
        assert config.data.train[0].split == "train[:80%]"
        assert config.data.eval_source.split == "train[80%:]" and config.data.batch_size <= 4
        assert config.data.text_len <= 24 and config.train.steps >= 100


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(3600)  # nine programs to compile, one after the other
def test_the_page_runs(folder, monkeypatch, capsys):
    for section in (*TASKS, "Search"):
        for words in commands_of(PAGE, section):
            run(words + (TINY if words[0] == "python" else []), monkeypatch)
        found = re.findall(r"`(runs/\w+/)?(\w+\.md)`", SECTIONS[section])
        where = next((place for place, _ in found if place), "runs/mine_pretrain/")
        assert all((folder / where / name).is_file() for _, name in found)
    assert capsys.readouterr().out.count("clips/") >= 5
