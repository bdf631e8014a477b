"""The examples of docs/extending.md, applied to a copy of the code and run together."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r'```python title="(.+?)"\n(.*?)```', PAGE, flags=re.DOTALL)
FLAGS = " ".join(re.findall(r"`(--(?:model|objectives|data)\.[^`]*)`", PAGE)).split()
SMALL = (  # beside the flags of the page: a run of seconds
    *("--train.steps", "2", "--train.log-every-steps", "1", "--optim.warmup-steps", "0"),
    *("--data.batch-size", "4", "--data.eval-batch-size", "4", "--data.num-workers", "0"),
    *("--model.video.mask.ratio", "0.25", "--workdir", "run"),
)


def insert(source: str, place: str, code: str) -> str:
    """Applies a block to a file.

    Args:
      source: the file.
      place: "before NAME", "in NAME" (the end of a table, or of the fields of a class), "imports",
        "CLASS.FIELD" (new names of a Literal), or "NAME", which is replaced.
      code: the block.
    """
    lines, tree = source.splitlines(keepends=True), ast.parse(source)
    word, _, name = place.rpartition(" ")
    if name == "imports":
        last = [item for item in tree.body if isinstance(item, ast.ImportFrom)][-1].end_lineno
        return "".join([*lines[:last], code, *lines[last:]])
    if "." in name:
        owner, field = name.split(".")
        literal = find(find(tree, owner), field).annotation
        at, end = literal.end_lineno - 1, literal.end_col_offset - 1
        names = re.search(r"\[\.\.\.(.*)\]", code)[1]
        return "".join([*lines[:at], lines[at][:end] + names + lines[at][end:], *lines[at + 1 :]])
    node = find(tree, name)
    if not word:
        return "".join([*lines[: node.lineno - 1], code, *lines[node.end_lineno :]])
    if word == "before":
        at, code = node.lineno - 1, code + "\n\n"
    elif isinstance(node, ast.ClassDef):
        fields = [i for i, item in enumerate(node.body) if isinstance(item, ast.AnnAssign)]
        at = node.body[fields[-1] + 1].end_lineno  # after the docstring of the last field
    else:
        tables = (ast.Dict, ast.Tuple)
        at = next(x for x in ast.walk(node.value) if isinstance(x, tables)).end_lineno - 1
    return "".join([*lines[:at], code, *lines[at:]])


def find(node: ast.AST, name: str) -> ast.AST:
    """Finds a class, function or assigned name in the body of a module or class."""
    for item in node.body:
        targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", item)]
        if name in {getattr(t, "id", getattr(t, "name", None)) for t in targets}:
            return item
    raise AssertionError(f"docs/extending.md names {name}, which is not there")


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """A copy of the code with all examples of the page."""
    copy = tmp_path_factory.mktemp("code")
    for folder in ("vlmae", "data_pipelines", "experiments"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for title, block in BLOCKS:
        name, _, place = title.partition(", ")
        path = copy / name
        if place:
            path.write_text(insert(path.read_text(), place, block))
        else:
            assert not path.exists(), f"{name} exists: say where the example goes"
            path.write_text(block)
    return copy


@pytest.fixture(scope="module")
def run(code, tmp_path_factory):
    """Runs a module of the copy, and fails as it does."""
    paths = {"PYTHONPATH": str(code), "HOME": str(tmp_path_factory.mktemp("home"))}

    def run(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=code,
            env=os.environ | paths,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_all_examples_of_the_page_work_together(code, run):
    run("-m", "vlmae", "prepare", "gradients")
    run("experiments/quickstart.py", *FLAGS, *SMALL, "--launch", "script")
    [command] = (code / "run" / "runs.sh").read_text().splitlines()
    run(*shlex.split(command)[1:])
    config = json.loads((code / "run" / "config.json").read_text())
    assert config["model"]["fusion"]["kind"] == "mean"
    logged = [
        json.loads(line) for line in (code / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    names = {name for line in logged for name in line}
    assert {"loss/alignment", "alignment/cosine", "retrieval/t2v_rank_90"} <= names
    run("-m", "vlmae", "export", "run", "exported", "--format", "npz")
    with np.load(code / "exported" / "params.npz") as params:
        assert "fusion/video_embed/kernel" in params


def test_a_place_that_is_not_there_is_named():
    with pytest.raises(AssertionError, match="TABLE"):
        insert("OTHER = {}\n", "in TABLE", "x")
