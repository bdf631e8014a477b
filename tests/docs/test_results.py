"""The pages of results are what docs/make_results.py renders from docs/results/*.json."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_results():
    path = ROOT / "docs" / "make_results.py"
    spec = importlib.util.spec_from_file_location("make_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_pages_are_rendered_from_the_files(make_results):
    page, results = make_results.load()
    again = "python docs/make_results.py"
    assert make_results.PAGE.read_text() == make_results.format_page(page, results), again
    readme = make_results.README.read_text()
    table = make_results.format_readme_table(page, results)
    assert readme == make_results.replace_between(readme, table), again


def test_every_result_is_on_the_page_once(make_results):
    page, results = make_results.load()
    shown = [name for names in page["sections"].values() for name in names]
    assert sorted(shown) == sorted(results)
    assert len(page["readme"]) == 8


def test_every_result_says_where_it_comes_from_and_has_full_rows(make_results):
    _, results = make_results.load()
    for name, result in results.items():
        assert all(result[key] for key in ("title", "command", "revision", "machine")), name
        for table in result["tables"]:
            widths = {len(row) for row in (table["columns"], *table["rows"])}
            assert widths == {len(table["columns"])}, name


def test_a_changed_cell_changes_page_and_readme(make_results):
    page, results = make_results.load()
    before = (
        make_results.format_page(page, results),
        make_results.format_readme_table(page, results),
    )
    results["easy_vqa"]["tables"][0]["rows"][0][1] = "12.3"
    after = make_results.format_page(page, results), make_results.format_readme_table(page, results)
    assert "12.3" in after[0] and "12.3" in after[1]
    assert before[0] != after[0] and before[1] != after[1]


def test_a_benchmark_s_report_is_taken_over(make_results, tmp_path, monkeypatch):
    from experiments.benchmarks.report import write_report

    monkeypatch.setattr(make_results, "RESULTS", tmp_path / "results")
    make_results.RESULTS.mkdir()
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "experiments.benchmarks.speed", "--x"])
    for seconds in ("1.5", "2.5"):
        table = f"| step | seconds |\n|---|---|\n| dense | {seconds} |"
        write_report(tmp_path, "speed", table, {"batch_size": 4}, rows=[{"seconds": 1}])
        make_results.add(tmp_path / "speed.json")
        target = make_results.RESULTS / "speed.json"
        result = json.loads(target.read_text())
        assert result["tables"] == [{"columns": ["step", "seconds"], "rows": [["dense", seconds]]}]
        assert result["command"] == "python -m experiments.benchmarks.speed --x"
        assert "jax" in result["machine"]
        target.write_text(make_results.dumps(result | {"title": "Speed"}))
    assert result["title"] == "Speed"  # what was written by hand stays


def test_runs_of_several_revisions_are_refused(make_results, tmp_path):
    environment = {"cpu": "a", "devices": ["cpu"], "python": "3.11", "packages": {"jax": "0.10.2"}}
    (tmp_path / "report.md").write_text("| run | R@1 |\n|---|---|\n| 0 | 40.0 |\n")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        text = json.dumps(environment | {"git_revision": "0123456789"})
        (tmp_path / name / "environment.json").write_text(text)
    assert make_results.read_source(tmp_path)["revision"] == "0123456"
    text = json.dumps(environment | {"git_revision": "fedcba9876"})
    (tmp_path / "b" / "environment.json").write_text(text)
    with pytest.raises(SystemExit, match="of 2 revisions"):
        make_results.read_source(tmp_path)
