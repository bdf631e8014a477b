"""Commands of the benchmarks that measure whole commands: what is measured, and which are run."""

import csv
import sys

import pytest

from experiments.benchmarks import journey
from experiments.benchmarks.commands import Step, format_table, run_step

PRINTS = "print('first', flush=True); time.sleep(0.7); print('compiled the step (a) in 2.5 s')"


def test_seconds_silence_and_disk_are_of_the_command(tmp_path):
    writes = f"import time; open('made', 'wb').write(bytes(3_000_000)); {PRINTS}"
    step = Step("a command", (sys.executable, "-c", writes), tmp_path / "made")
    row = run_step(step, tmp_path / "logs", tmp_path)
    assert row["compile_secs"] == 2.5 and row["disk_mb"] == 3
    assert 0.6 <= row["silence_secs"] <= row["secs"]
    assert (tmp_path / "logs" / "a_command.txt").read_text().startswith("first")
    assert 0.001 < row["peak_gib"] < 0.1  # of a bare Python, however large this process is


def test_bars_are_drawn(tmp_path):
    counts = "import tqdm; [i for i in tqdm.tqdm(range(1000), dynamic_ncols=True)]"
    run_step(Step("bar", (sys.executable, "-c", counts)), tmp_path, tmp_path)
    assert "1000/1000" in (tmp_path / "bar.txt").read_text()


def test_a_command_that_fails_ends_the_benchmark_with_its_words(tmp_path):
    step = Step("fails", (sys.executable, "-c", "print('why'); raise SystemExit(3)"))
    with pytest.raises(SystemExit, match=r"fails: exit code 3.*\n.*why"):
        run_step(step, tmp_path / "logs", tmp_path)


def test_a_command_is_killed_once_its_file_is_there(tmp_path):
    waits = "import time; open('saved', 'w'); time.sleep(600)"
    step = Step("killed", (sys.executable, "-c", waits), kill_at=tmp_path / "saved")
    assert run_step(step, tmp_path / "logs", tmp_path)["secs"] < 600
    never = Step("ended before", (sys.executable, "-c", "pass"), kill_at=tmp_path / "never")
    with pytest.raises(SystemExit, match="exit code 0"):
        run_step(never, tmp_path / "logs", tmp_path)


def test_columns_without_figures_are_left_out():
    row = {"step": "a", "secs": 1.0, "compile_secs": None, "silence_secs": 0.5, "peak_gib": 2.0}
    rows = [row | {"disk_mb": None}, row | {"secs": 12.0, "disk_mb": None}]
    assert format_table(rows).splitlines()[0] == "| command | s | longest silence, s | peak GiB |"
    rows[1] |= {"disk_mb": 3.0}
    assert format_table(rows).splitlines()[2] == "| a | 1 | 0.5 | 2.00 | |"


def test_the_journey_has_the_tables_and_commands_of_its_page(tmp_path):
    journey.make_folder(tmp_path, clips=3, pixels=16)
    tables = {path.stem: list(csv.DictReader(path.open())) for path in tmp_path.glob("*.csv")}
    assert set(tables) == {"captions", "questions", "choices", "labels"}
    for rows in tables.values():
        assert {row["media"] for row in rows} == {f"clips/{i}.mp4" for i in (1, 2, 3)}
        assert all((tmp_path / row["media"]).is_file() for row in rows)
    names = [step.name for step in journey.steps()]
    assert len(names) == 10 and names[0].startswith("vlmae prepare manifest --name mine ")
    assert names[-1].startswith("vlmae search runs/mine_pretrain clips")
