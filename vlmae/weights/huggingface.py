"""Folders of published weights: their family, the config that they need, and their tensors.

Tensors are read from safetensors files alone. Pickle files are never opened.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from data_pipelines.schema.checks import UserError, check, first_line
from data_pipelines.schema.checksum import check_sums
from data_pipelines.schema.fields import shown
from data_pipelines.schema.json_files import read_json
from vlmae.config.model import ModelConfig, TextLayout, VitLayout
from vlmae.weights.families import ACTIVATIONS, FAMILIES, Family
from vlmae.weights.tensors import Read, read_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # never opened: they can run code
# The encoders of a whole CLIP or SigLIP: their place in its config.json, and how their tensors'
# names begin.
TOWERS = {
    "text": ("text_config", ("text_model.", "text_projection.", "logit_")),
    "video": ("vision_config", ("vision_model.", "visual_projection.")),
}
NOT_READ = {
    "siglip_text_model": "SigLIP's text tower reads padding, and its tokenizer begins a text with "
    "no token, which no text encoder here does: --train.init.video alone takes its vision tower",
}
FILES = ("*.safetensors", "*.json", "vocab.txt")  # fetched from the hub; no pickle among them


class Published(NamedTuple):
    """Published encoder with its config."""

    folder: Path
    model_type: str
    hf: dict[str, Any]  # its config.json, completed by the defaults of its family
    fields: dict[str, Any]  # of `model.text` or `model.video`
    embed_dim: int = 0  # width of the space that it shares with another encoder; 0 without one

    @property
    def family(self) -> Family:
        """Table of its tensors and fields."""
        return FAMILIES[self.model_type]

    def of_another_encoder(self, name: str) -> bool:
        """Return True for a tensor of the other encoder of a whole CLIP."""
        return any(
            name.startswith(prefixes)
            for part, (_, prefixes) in TOWERS.items()
            if part != self.family.part
        )


def find(source: str, files: Sequence[str] = FILES) -> Path:
    """Find a local folder, or fetch a model of the hub without its pickle files.

    Args:
      source: the folder, or OWNER/NAME on the hub.
      files: patterns of what is fetched.

    Returns:
      The folder, or the hub's local copy.

    Raises:
      UserError: neither exists; says what was tried.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    # A hub name is OWNER/NAME; anything else can only be a mistyped path.
    # Asked before the hub: a typing error must not cost a request, or fetch another's model.
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source}: no such folder")
    import huggingface_hub  # comes with transformers; slow to import

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{source}: no such folder, nor a model of the hub: {reason}") from error


def open_published(source: str, part: str = "video") -> Published:
    """Read the config of published weights, given a folder or hub name.

    Args:
      source: a folder or hub name.
      part: "text" or "video", the encoder to read of a whole CLIP.

    Raises:
      UserError: no config.json, one of an unknown family, or one with a layer that the model does
        not have; names the file and the field.
    """
    folder = find(source)
    path = folder / "config.json"
    whole, tower = read_json(path), TOWERS[part][0]
    hf = whole.get(tower, whole)
    check(isinstance(hf, dict), f"{path}: {tower} must be an object")
    model_type = str(hf.get("model_type", ""))
    # Old files of a whole CLIP repeat its type in its parts.
    if model_type == "clip":
        model_type = {"text": "clip_text_model", "video": "clip_vision_model"}[part]
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        unknown = f"model_type {model_type!r} is none of {known}"
        raise UserError(f"{path}: {NOT_READ.get(model_type, unknown)}")
    family = FAMILIES[model_type]
    with _named(path):
        hf = family.complete(hf)  # first, since a config.json leaves out what is at its default
        _check_types(path, hf, family.complete({}))
        _check_supported(path, hf)
        fields = family.fields(hf)
    if family.part == "video":
        fields["layout"] = _with_pixels(folder, fields["layout"])
    embed_dim = 0
    if model_type in ("clip_text_model", "clip_vision_model"):
        embed_dim = whole.get("projection_dim", 512)  # CLIPConfig's
        check(type(embed_dim) is int, f"{path}: projection_dim must be of type int")
    return Published(folder, model_type, hf, fields, embed_dim)


def _check_types(path: Path, hf: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise UserError for a field of another type than its default."""
    for name, default in defaults.items():
        kinds = (int, float) if type(default) in (int, float) else (type(default),)
        good = type(hf[name]) in kinds or name == "image_size"  # a pair in some, and never read
        check(good, f"{path}: {name} must be of type {kinds[-1].__name__}, not {shown(hf[name])}")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise UserError, naming the file, for fields that are missing or of another type."""
    try:
        yield
    except UserError as error:
        named = str(error).startswith(str(path))
        raise UserError(str(error) if named else f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: a field is of another type: {error}") from error


def load_published(source: str, part: str, model: ModelConfig, meant: Collection[str] = ()) -> Read:
    """Read the parameters of `model` that a published encoder has.

    Args:
      source: a folder or hub name.
      part: "text" or "video".
      model: the config, which must be of the same layout; it may have fewer layers.
      meant: fields that may differ, such as "model.video.layout.eps".

    Raises:
      UserError: as `open_published` and `read_folder`; or the config does not fit: lists each
        field with both values.
    """
    # Config before tensors: a misfit is named at once, not as a list of shapes.
    published = open_published(source, part)
    if published.family.part != part:
        raise UserError(f"{published.folder} is no {part} encoder but {published.model_type}")
    found = differences(published.fields, getattr(model, part))
    wrong = [line for line in found if f"model.{part}.{line.split()[0]}" not in meant]
    if wrong:
        lines = "\n".join(f"  model.{part}.{line}" for line in wrong)
        raise UserError(f"the config does not fit {published.folder}:\n{lines}")
    tensors = read_folder(published.folder, lambda name: not published.of_another_encoder(name))
    return read_tensors(tensors, published.family, model)


def differences(fields: dict[str, Any], part: Any) -> Iterator[str]:
    """Yield a line for each config field that does not fit published weights; fewer layers do."""
    for name, wanted in fields.items():
        value = getattr(part, name)
        if isinstance(wanted, VitLayout | TextLayout):
            # Field by field, so that the message is a list of flags to set.
            yield from (f"layout.{line}" for line in differences(asdict(wanted), value))
        elif name == "layer_scale":  # an initial value: only its presence changes the parameters
            if bool(wanted) != bool(value):
                yield f"{name} is {value}, must be {wanted}"
        elif name == "depth":  # the first blocks of a deeper model are a fair start
            # A shallower model of ours takes the first blocks; a deeper one would be half random.
            if value > wanted:
                yield f"depth is {value}, at most {wanted}"
        elif value != wanted and not (isinstance(wanted, tuple) and np.allclose(value, wanted)):
            yield f"{name} is {value}, must be {wanted}"


def read_folder(
    folder: Path, is_read: Callable[[str], bool] = lambda _: True
) -> dict[str, np.ndarray]:
    """Read the float tensors of a folder's safetensors files, as float32.

    Args:
      folder: a folder in Hugging Face's layout.
      is_read: True for the names of the tensors to read; all by default.

    Raises:
      UserError: no such file, or only pickle files, or a damaged file; names the file.
    """
    # Large models are split over files, which the index names.
    names = _indexed(folder / INDEX) if (folder / INDEX).is_file() else [WEIGHTS]
    for name in names:
        # A file elsewhere is none of the model's, whatever a stranger's index says.
        check(Path(name).name == name, f"{folder / INDEX}: {name!r} is no file name")
        if not (folder / name).is_file():
            raise UserError(_missing(folder, name))
    check_sums(folder, names)
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= read_file(folder / name, is_read)
    return tensors


def _indexed(path: Path) -> list[str]:
    """List the files that an index names."""
    files = read_json(path).get("weight_map")
    good = isinstance(files, dict) and all(isinstance(name, str) for name in files.values())
    check(good, f"{path}: weight_map must be an object of file names")
    return sorted({*files.values()})


def read_file(path: Path, is_read: Callable[[str], bool] = lambda _: True) -> dict[str, np.ndarray]:
    """Read the float tensors of a safetensors file; half precision is widened to float32.

    Args:
      path: the file.
      is_read: True for the names of the tensors to read; all by default.

    Raises:
      UserError: the file is damaged; names it.
    """
    try:
        # The framework "numpy" cannot read bfloat16.
        with safe_open(path, framework="flax") as file:
            arrays = {x: np.asarray(file.get_tensor(x)) for x in filter(is_read, file.keys())}
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    # Some files hold position ids too, which are integers and no parameters.
    floats = {n: x for n, x in arrays.items() if x.dtype.kind == "f" or x.dtype.name == "bfloat16"}
    return {name: np.asarray(x, np.float32) for name, x in floats.items()}


def merge_trees(trees: list[PyTree]) -> PyTree:
    """Merge trees whose leaves have different paths."""
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
    """Raise UserError for options of a config.json that our models do not have."""
    if hf["hidden_act"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{path}: hidden_act {hf['hidden_act']!r} is none of {known}")
    if hf.get("use_swiglu_ffn"):
        raise UserError(f"{path}: use_swiglu_ffn: SwiGLU layers are not supported")
    kind = hf.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise UserError(f"{path}: position_embedding_type {kind!r} is not supported")


def _with_pixels(folder: Path, layout: VitLayout) -> VitLayout:
    """Replace mean and std by those of preprocessor_config.json, if it exists."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return layout
    given = read_json(path)
    mean, std = given.get("image_mean"), given.get("image_std")
    if not given.get("do_normalize", True) or mean is None or std is None:
        return layout
    for x in (mean, std):
        good = isinstance(x, list) and [type(v) in (int, float) for v in x] == [True] * 3
        check(good, f"{path}: image_mean and image_std must hold three numbers")
    with _named(path):
        return VitLayout(**asdict(layout) | {"pixel_mean": tuple(mean), "pixel_std": tuple(std)})
