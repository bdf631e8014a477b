"""A newcomer's hour: every command of docs/guide/own-videos.md, on 60 clips, with its seconds.

    python -m experiments.benchmarks.journey

The clips are rendered moving shapes, in a folder with the page's four tables; the commands are
those that the page shows, one after the other, in a new home folder.
"""

import csv
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import tyro

from data_pipelines.storage.builders.shapes import SHAPES, Shapes
from data_pipelines.storage.tasks import Task
from experiments.benchmarks.commands import ROOT, Step, format_table, run_step
from experiments.benchmarks.report import print_report, write_report

PAGE = ROOT / "docs" / "guide" / "own-videos.md"
SECTIONS = ("Captions", "Questions", "Options", "Labels", "Search")


def commands_of(page: str, section: str) -> list[list[str]]:
    """List the words of the shell commands that a section of a page shows."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def make_folder(folder: Path, clips: int, pixels: int) -> None:
    """Write clips and the tables captions.csv, questions.csv, choices.csv and labels.csv."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    tables = {
        "captions": [["media", "caption"]],
        "questions": [["media", "question", "answer", "kind"]],
        "choices": [["media", "question", "options", "answer"]],
        "labels": [["media", "labels"]],
    }
    builder = Shapes(frame_size=pixels, data_dir=folder / "unused")
    for i in range(clips):
        example = builder.load(Task(path=f"train/{i}", size=0))
        media = f"clips/{i + 1}.mp4"
        (folder / media).write_bytes(example.media)
        tables["captions"] += [[media, text] for text in example.captions]
        tables["questions"] += [[media, q.question, q.answer, q.kind] for q in example.questions]
        asked = next(q for q in example.questions if q.kind == "shape")
        tables["choices"].append([media, asked.question, "|".join(SHAPES), asked.answer])
        tables["labels"].append([media, "|".join(example.labels)])
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def steps() -> Iterator[Step]:
    """List the page's commands, run by this Python."""
    for section in SECTIONS:
        for words in commands_of(PAGE.read_text(), section):
            name = shlex.join(words)
            if words[0] == "vlmae":
                given = [sys.executable, "-m", "vlmae", *words[1:]]
            else:
                given = [sys.executable, str(ROOT / words[1]), *words[2:]]
            yield Step(name, tuple(given))


def main(
    workdir: Path = Path("runs/journey"),
    clips: int = 60,
    pixels: int = 128,
    out_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Print the table, and write journey.md and journey.json.

    Args:
      workdir: a new folder, for the clips, the tables, prepared data and the runs.
      clips: how many.
      pixels: their height and width.
      out_dir: where the table goes.
    """
    workdir = workdir.absolute()
    if workdir.exists():
        raise SystemExit(f"error: {workdir} is there already; a newcomer has nothing yet")
    make_folder(workdir, clips, pixels)
    home = {"HOME": str(workdir / "home")}  # a newcomer's: nothing is prepared, nothing compiled
    rows = [run_step(step, workdir / "logs", workdir, **home) for step in steps()]
    settings = {"clips": clips, "pixels": pixels}
    write_report(out_dir, "journey", format_table(rows), settings, rows=rows)
    print_report(format_table(rows), settings)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
