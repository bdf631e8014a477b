"""Checksums of folders: against coreutils, and every kind of damage is named."""

import shutil
import subprocess
from pathlib import Path

import pytest

from data_pipelines.schema.checksum import (
    SKIP,
    SUMS,
    DamagedError,
    check_sums,
    read_sums,
    write_sums,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in {"a.bin": b"\x00" * 5000, "b/c d.txt": b"text", "empty": b""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_sums(tmp_path)
    return tmp_path


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs coreutils")
def test_coreutils_agrees(folder):
    done = subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=folder, capture_output=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3
    check_sums(folder)


DAMAGES = {
    "flipped": (lambda x: (x / "a.bin").write_bytes(b"\x00" * 4999 + b"\x01"), "a.bin is damaged"),
    "cut": (lambda x: (x / "b/c d.txt").write_bytes(b"tex"), "c d.txt is damaged"),
    "emptied": (lambda x: (x / "a.bin").write_bytes(b""), "a.bin is damaged"),
    "removed": (lambda x: (x / "empty").unlink(), "empty is missing"),
    "other sum": (lambda x: change(x, "a.bin", "0" * 64), "a.bin is damaged"),
    "no sum": (lambda x: (x / SUMS).write_text("no sums\n"), f"{SUMS}:1: must be"),
    "emptied sums": (lambda x: (x / SUMS).write_text(""), f"{SUMS}:1: must be"),
    "binary sums": (lambda x: (x / SUMS).write_bytes(b"\xff\xfe"), f"{SUMS}: not UTF-8"),
}


def change(folder: Path, name: str, value: str) -> None:
    path = folder / SUMS
    path.write_text(path.read_text().replace(read_sums(folder)[name], value))


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(folder, monkeypatch, damage, message):
    damage(folder)
    with pytest.raises(DamagedError, match=message) as error:
        check_sums(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setenv(SKIP, "1")
    check_sums(folder)


def test_only_the_named_files_are_checked(folder):
    (folder / "a.bin").write_bytes(b"other")
    check_sums(folder, ["empty", "not listed"])
    with pytest.raises(DamagedError):
        check_sums(folder, ["a.bin"])


def test_a_folder_without_sums_is_not_checked(folder):
    (folder / SUMS).unlink()
    (folder / "a.bin").write_bytes(b"other")
    check_sums(folder)
    assert read_sums(folder) == {}
