"""The site builds without warnings, and its pages load nothing from other hosts."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Attributes by which a page loads something; an <a href> only links.
LOADED = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=["'](https?://[^"']+)""")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    loaded = {url for page in pages for url in LOADED.findall(page.read_text())}
    assert not loaded
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"url\(['\"]?https?:", styles)


def test_every_page_is_in_the_navigation(site):
    home = (site / "index.html").read_text()
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs).with_suffix(".html")) for path in docs.rglob("*.md")}
    hidden = {page for page in pages if f'href="{page}"' not in home}
    assert hidden == {"results/README.html"}


def test_docstrings_become_markdown():
    spec = importlib.util.spec_from_file_location("site", ROOT / "docs" / "site_docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "Keep [CLS] and `x[0]`.\n\n>>> f([1])\n[2]\n\n    y[0]\n\nvlmae status DIR\n"
    assert module.as_markdown(text) == (
        "Keep \\[CLS] and `x[0]`.\n\n```pycon\n>>> f([1])\n[2]\n```\n\n    y[0]\n\n"
        "```bash\nvlmae status DIR\n```\n"
    )
