"""The project keeps its promises: one list of dependencies, one direction of imports, true docs."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("experiments", "vlmae", "data_pipelines")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules of ours that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    ours = {f"{p.relative_to(ROOT).with_suffix('')}".replace("/", ".") for p in all_modules()}
    ours = {name.removesuffix(".__init__") for name in ours}
    return {name for name in found if name in ours and name not in PACKAGES}


def all_modules() -> list[Path]:
    return [path for package in PACKAGES for path in modules(package)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")


ALLOWED = {  # module, or package -> what of ours it may import
    "data_pipelines": ("data_pipelines",),
    "vlmae": ("vlmae", "data_pipelines.records", "data_pipelines.config"),
    "vlmae.masking": (),
    "vlmae.losses": (),
    "vlmae.sparsify": (),
    "vlmae.pooling": (),
    "vlmae.choices": (),
    "vlmae.models": (
        "vlmae.models",
        "vlmae.masking",
        "vlmae.sparsify",
        "vlmae.pooling",
        "vlmae.config",
        "vlmae.model_config",
        "vlmae.sharding",
    ),
    "vlmae.sharding": ("vlmae.config",),
    "vlmae.cli": ("vlmae", "data_pipelines"),
    "vlmae.evaluate": ("vlmae", "data_pipelines"),
    "vlmae.explain": ("vlmae", "data_pipelines"),
    "vlmae.search": ("vlmae", "data_pipelines"),
    "vlmae.search.index": (),
    "vlmae.evaluators": (
        "vlmae",
        "data_pipelines.records",
        "data_pipelines.classes",
        "data_pipelines.evaluation",
    ),
    "experiments": ("experiments", "vlmae", "data_pipelines"),
}


@pytest.mark.parametrize("path", all_modules(), ids=name_of)
def test_imports_go_one_way(path):
    name = name_of(path)
    rule = max((key for key in ALLOWED if f"{name}.".startswith(f"{key}.")), key=len)
    for imported in imports_of(path):
        assert f"{imported}.".startswith(tuple(f"{ok}." for ok in ALLOWED[rule])), imported


def test_the_library_imports_nothing_heavy():
    heavy = ["av", "transformers", "torch", "tensorflow", "tensorboardX", "submitit", "matplotlib"]
    code = (
        "import sys, vlmae.train, vlmae.models.video_language;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_requirements_and_metadata_agree():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line for line in lines if line and not line.startswith(("#", "-"))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert required == set(project["dependencies"])
    assert "-e ." in lines


def test_ci_does_what_the_readme_says():
    readme = (ROOT / "README.md").read_text()
    install, test = re.search(r"pip install (.*\[test\]\") && (pytest .*)", readme).groups()
    ci = (ROOT / ".ci" / "run").read_text()
    assert install in ci and test in ci


def test_readme_names_only_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"\b(?:python (?:-m )?|]\((?!http))([\w./]+)", readme)
    files = (".py", ".png", ".md")
    paths = [Path(n if n.endswith(files) else n.replace(".", "/") + ".py") for n in named]
    # A package is run by its __main__.py.
    missing = [
        str(path)
        for path in paths
        if not ((ROOT / path).exists() or (ROOT / path.with_suffix("") / "__main__.py").exists())
    ]
    assert len(paths) > 5 and not missing
