"""A folder of published weights: which family it is, what config it asks for, its tensors.

Only tensors are read, from safetensors files. Pickle files are never opened.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from vlmae.interop.families import FAMILIES, Family
from vlmae.interop.tensors import Read, read_tensors
from vlmae.model_config import ModelConfig, VitLayout
from vlmae.workdir import PICKLES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ("*.safetensors", "*.json", "vocab.txt")  # what is fetched from a hub


class Published(NamedTuple):
    """A published encoder."""

    folder: Path
    model_type: str
    hf: dict[str, Any]  # its config.json, with what that leaves out
    fields: dict[str, Any]  # of `model.text` or `model.video`

    @property
    def family(self) -> Family:
        """The table of its names."""
        return FAMILIES[self.model_type]


def find(source: str) -> Path:
    """A local folder, or the local copy of a model on the hub, fetched without pickle files.

    Raises:
      ValueError: neither is there; says what was tried.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source}: no such folder")
    import huggingface_hub  # it comes with transformers

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source}: no such folder, nor a model of the hub: {reason}") from error


def open_published(source: str) -> Published:
    """Reads the config of a folder or hub name; see `find`.

    Raises:
      ValueError: there is no config.json, or it is none of `FAMILIES`, or has what none of our
        layouts has; names the file and the field.
    """
    folder = find(source)
    path = folder / "config.json"
    hf = read_json(path)
    hf = hf.get("vision_config", hf)  # of a whole CLIP
    model_type = hf.get("model_type", "")
    if model_type == "clip":
        model_type = "clip_vision_model"
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{path}: model_type {model_type!r} is none of {known}")
    family = FAMILIES[model_type]
    hf = family.complete(hf)
    _check_supported(path, hf)
    fields = family.fields(hf)
    if "layout" in fields:
        fields["layout"] = _with_pixels(folder, fields["layout"])
    return Published(folder, model_type, hf, fields)


def load_published(source: str, part: str, model: ModelConfig) -> Read:
    """The parameters of `model` that a published encoder has, and its tensors that are left over.

    Args:
      source: a folder or hub name.
      part: "text" or "video".
      model: the config, which must be of the same layout; it may have fewer layers.

    Raises:
      ValueError: see `open_published`, `read_folder`; or the config is of another layout: lists
        each field with both values.
    """
    published = open_published(source)
    if published.family.part != part:
        raise ValueError(f"{published.folder} is no {part} encoder but {published.model_type}")
    wrong = list(differences(published.fields, getattr(model, part)))
    if wrong:
        lines = "\n".join(f"  model.{part}.{line}" for line in wrong)
        raise ValueError(f"the config does not fit {published.folder}:\n{lines}")
    return read_tensors(read_folder(published.folder), published.family, model)


def differences(fields: dict[str, Any], part: Any) -> Iterator[str]:
    """Fields of a config that do not fit published weights; fewer layers do."""
    for name, wanted in fields.items():
        value = getattr(part, name)
        if isinstance(wanted, VitLayout):
            yield from (f"layout.{line}" for line in differences(asdict(wanted), value))
        elif name == "layer_scale":
            if bool(wanted) != bool(value):
                yield f"{name} is {value}, must be {wanted}"
        elif name == "depth":
            if value > wanted:
                yield f"depth is {value}, at most {wanted}"
        elif value != wanted and not (isinstance(wanted, tuple) and np.allclose(value, wanted)):
            yield f"{name} is {value}, must be {wanted}"


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """All float tensors of the safetensors files of a folder, as float32.

    Raises:
      ValueError: there are none, or only pickle files; a file is damaged; names the file.
    """
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    else:
        names = [WEIGHTS]
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(_missing(folder, name))
        tensors |= read_file(folder / name)
    return tensors


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The float tensors of a safetensors file, as float32; half precision is widened.

    Raises:
      ValueError: the file is damaged; names it.
    """
    try:
        with safe_open(path, framework="flax") as file:
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    floats = {n: x for n, x in arrays.items() if x.dtype.kind == "f" or x.dtype.name == "bfloat16"}
    return {name: np.asarray(x, np.float32) for name, x in floats.items()}


def merge_trees(trees: list[PyTree]) -> PyTree:
    """One tree of all branches; each leaf is in one of them."""
    return unflatten_dict({path: x for tree in trees for path, x in flatten_dict(tree).items()})


def _missing(folder: Path, name: str) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        return f"{folder}: no {name}"
    return (
        f"{folder}: no {name}, only {', '.join(pickles)}, and pickle files are never opened here, "
        "for they can run code; who trusts them converts them by transformers: "
        f"AutoModel.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
    )


def _check_supported(path: Path, hf: dict[str, Any]) -> None:
    """Raises ValueError for what changes the computation and has no field in our config."""
    if hf["hidden_act"] not in ("gelu", "quick_gelu"):
        raise ValueError(f"{path}: hidden_act {hf['hidden_act']!r} is neither gelu nor quick_gelu")
    if hf.get("use_swiglu_ffn"):
        raise ValueError(f"{path}: use_swiglu_ffn: SwiGLU layers are not supported")
    kind = hf.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"{path}: position_embedding_type {kind!r} is not supported")


def _with_pixels(folder: Path, layout: VitLayout) -> VitLayout:
    """The layout with the normalization of preprocessor_config.json, if there is one."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return layout
    given = read_json(path)
    mean, std = given.get("image_mean"), given.get("image_std")
    if not given.get("do_normalize", True) or mean is None or std is None:
        return layout
    return VitLayout(**asdict(layout) | {"pixel_mean": tuple(mean), "pixel_std": tuple(std)})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: the file cannot be read, or holds something else; names it.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not an object")
    return value
