"""Render docs/results.md and the README's table of results from docs/results/*.json.

    python docs/make_results.py                                        # render
    python docs/make_results.py --add runs/benchmarks/cost_parts.json  # take over figures, render

docs/results/README.md describes the files.
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEAD = """# Results

Figures come from `docs/results/*.json`; `python docs/make_results.py` renders this page and the
README's table from them. The machine is shared, and the same program may take a fifth longer at
another time, so comparisons are made within a run. Nothing has run on a GPU yet. Steps are
compiled for GPUs that are not there ([how](guide/gpu.md)); such figures are marked "compiled for an
H100, not run".

Since revision 93deedf the kernels of narrow models start larger (as large as BERT's do at its
width). Small models learn faster with it. Results marked "before 93deedf" hold among themselves,
not with later figures.
"""


def markdown_tables(text: str) -> list[dict]:
    """Read the Markdown tables of a text: `[{"columns": [...], "rows": [[...], ...]}, ...]`."""
    blocks = re.findall(r"(?:^\|.*\|[ ]*$\n?)+", text, flags=re.MULTILINE)
    tables = [
        [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines()]
        for block in blocks
    ]
    return [{"columns": rows[0], "rows": rows[2:]} for rows in tables]


def format_table(table: dict) -> str:
    """Write a table as Markdown."""
    rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def format_result(result: dict) -> str:
    """Write a result: its setting, tables and notes, then command, revision and machine."""
    revision = f"Revision {result['revision']}" if result["revision"] else "Revision not recorded"
    source = f"*`{result['command']}`. {revision}. {result['machine']}.*"
    tables = map(format_table, result["tables"])
    parts = [f"### {result['title']}", result["intro"], *tables, *result["notes"], source]
    return "\n\n".join(filter(None, parts))


def format_page(page: dict, results: dict[str, dict]) -> str:
    """Write the whole of docs/results.md."""
    sections = [
        "\n\n".join([f"## {title}", *(format_result(results[name]) for name in names)])
        for title, names in page["sections"].items()
    ]
    return "\n\n".join([HEAD.rstrip(), *sections]) + "\n"


def cell(results: dict[str, dict], name: str, table: int, row: str | int, column: str | int) -> str:
    """Find a cell; rows go by their first cell or their number, columns by head or number."""
    found = results[name]["tables"][table]
    heads, firsts = found["columns"], [cells[0] for cells in found["rows"]]
    row = firsts.index(row) if isinstance(row, str) else row
    return found["rows"][row][heads.index(column) if isinstance(column, str) else column]


def format_readme_table(page: dict, results: dict[str, dict]) -> str:
    """Write the README's table: each figure is a cell of a result, linked to its section."""
    rows = []
    for line in page["readme"]:
        cells = [cell(results, *where).split(" (")[0] for where in line["cells"]]
        title = results[line["cells"][0][0]]["title"]
        link = f"[{title}](docs/results.md#{anchor(title)})"
        rows.append([line["what"], line["figure"].format(*cells), link])
    return format_table({"columns": ["measured", "result", "details"], "rows": rows})


def anchor(title: str) -> str:
    """Make the anchor of a heading, as GitHub and MkDocs do."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def replace_between(text: str, content: str) -> str:
    """Replace the text between the two marker comments."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def load() -> tuple[dict, dict[str, dict]]:
    """Read the order of the page, and all results by name."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    return files.pop("page"), files


def read_source(path: Path) -> dict:
    """Read the figures of a benchmark (its NAME.json and NAME.md), or of a folder of runs.

    A folder gives the tables of its evaluation or of `vlmae report`, and the environment of its
    runs.

    Raises:
      SystemExit: there is no table, or the runs are of several revisions.
    """
    if path.suffix == ".json":
        report = json.loads(path.read_text())
        places, texts = [report["environment"]], [path.with_suffix(".md")]
        command = {"command": report["command"]}
    else:
        places = [json.loads(p.read_text()) for p in sorted(path.rglob("environment.json"))]
        texts, command = sorted(path.glob("*.md")), {}
    tables = [table for text in texts for table in markdown_tables(text.read_text())]
    revisions = {place["git_revision"] for place in places}
    if not tables or len(revisions) != 1:
        raise SystemExit(f"error: {path} has {len(tables)} tables, of {len(revisions)} revisions")
    figures = {"revision": short(revisions.pop()), "machine": machine(places[0]), "tables": tables}
    return command | figures


def short(revision: str) -> str:
    """Shorten a commit's name to seven digits; "+changes" stays."""
    return re.sub(r"^([0-9a-f]{7})[0-9a-f]+", r"\1", revision)


def machine(environment: dict) -> str:
    """Describe where something ran, from its environment.json."""
    packages = environment["packages"]
    device = ", ".join(sorted(set(environment["devices"])))
    return f"{environment['cpu']}, {device}, Python {environment['python']}, jax {packages['jax']}"


def add(path: Path) -> None:
    """Take over the figures of a source; title, setting and notes of the old result stay."""
    target = RESULTS / f"{path.stem}.json"
    by_hand = {"title": path.stem, "command": "", "intro": "", "notes": []}
    old = json.loads(target.read_text()) if target.exists() else by_hand
    target.write_text(dumps(old | read_source(path)))
    print(f"{target}: read its intro and notes again, they may name old figures")


def dumps(result: dict) -> str:
    """Write JSON with a row of a table on each line."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    string = r'"(?:[^"\\]|\\.)*"'
    row = re.compile(rf"\[\n\s+({string}(?:,\n\s+{string})*)\n\s+\](?=,?\n\s+[\[\]\"])")
    return row.sub(lambda found: "[" + re.sub(r",\n\s+", ", ", found[1]) + "]", text) + "\n"


def main() -> None:
    """Take over what --add names, then render both pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", type=Path, nargs="*", default=[], metavar="SOURCE")
    for path in parser.parse_args().add:
        add(path)
    page, results = load()
    PAGE.write_text(format_page(page, results))
    README.write_text(replace_between(README.read_text(), format_readme_table(page, results)))


if __name__ == "__main__":
    main()
