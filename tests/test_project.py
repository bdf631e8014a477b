"""The project keeps its promises: one list of dependencies, true docs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@pytest.mark.e2e
def test_the_library_imports_nothing_heavy():
    heavy = ["av", "transformers", "torch", "tensorflow", "tensorboardX", "submitit", "matplotlib"]
    code = (
        "import sys, vlmae.training.train, vlmae.models.video_language;"
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
    links = re.findall(r"\]\((?!http)([^)#]+)", readme)
    scripts = re.findall(r"\bpython ([\w./]+\.py)", readme)
    modules = [name.replace(".", "/") + ".py" for name in re.findall(r"python -m ([\w.]+)", readme)]
    assert len(links) > 15 and len(scripts) > 5
    missing = {name for name in links + scripts + modules if not (ROOT / name).exists()}
    assert not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_changelog_names_modules_that_exist():
    rows = re.findall(r"^\| `[\w.*]+` \| `([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    modules = [name for name in rows if name.startswith(("vlmae.", "data_pipelines."))]
    paths = [ROOT / name.replace(".", "/") for name in modules]
    missing = [path for path in paths if not (path.with_suffix(".py").is_file() or path.is_dir())]
    assert len(modules) > 80 and not missing


def test_lock_files_meet_the_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    locks = list((ROOT / "requirements").glob("lock-*.txt"))
    for lock in locks:
        pins = [line.split("==") for line in lock.read_text().splitlines() if line[0] != "#"]
        versions = {canonicalize_name(name): version for name, version in pins}
        for package in required:
            assert package.specifier.contains(versions[canonicalize_name(package.name)]), package
    assert locks
