"""A run as an exported folder: what its `config.json` says, and the way back to parameters."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from data_pipelines.config import DataConfig
from vlmae.config import ExperimentConfig, config_of
from vlmae.config_tree import override
from vlmae.interop.published import WEIGHTS, read_folder, read_json
from vlmae.interop.torch_names import from_torch
from vlmae.model_config import ModelConfig
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.sharding import path_name

FORMAT_VERSION = 1  # of config.json and of the names of the tensors; as in torch_model.py
TEMPORAL = "video_encoder.temporal"
LOCAL_PATHS = {
    "data.data_dir": DataConfig().data_dir,
    "data.tokenizer": "",  # it lies in the folder, as the classes do
    "data.classes": "",
    "train.init_from": "",
}


class Exported(NamedTuple):
    """The model of an exported folder, without its parameters."""

    model: ModelConfig
    image_size: int  # pixels
    parts: tuple[str, ...]  # of the model; those that the checkpoint holds
    num_options: int  # that the head of multiple choice tells apart; 0: there is none
    step: int  # of the checkpoint


def describe(config: ExperimentConfig, params: PyTree, step: int) -> dict:
    """The contents of `config.json` for the checkpoint of a run; "experiment" is all but the model.

    What stands at the top is for those who serve the model: the sizes that a clip and a text had
    in evaluation, what the model consists of, and the template of multiple-choice questions. Paths
    of the machine that trained it are left out.
    """
    experiment = dataclasses.asdict(override(config, LOCAL_PATHS))
    temporal = [TEMPORAL] if "temporal" in params.get("video_encoder", {}) else []
    selector = config.model.selector.kind
    chooses = ["frame_selector"] if selector in ("uniform", "random") else []  # no parameters
    head = params.get("choice_head")
    return {
        "format_version": FORMAT_VERSION,
        "model_type": "vlmae",
        "architectures": ["VlmaeModel"],
        "auto_map": {
            "AutoConfig": "auto_vlmae.VlmaeConfig",
            "AutoModel": "auto_vlmae.VlmaeModel",
        },
        "dtype": "float32",
        "step": step,
        "image_size": config.data.image_size,
        "num_frames": config.data.eval.num_frames,
        "text_len": config.data.text_len,
        "num_options": 0 if head is None else head["bias"].shape[0],
        "options_template": config.objectives.mcm_template if head else "",
        "parts": sorted([*params, *temporal, *chooses]),
        "model": experiment.pop("model"),
        "experiment": experiment,
    }


def exported_of(config: ExperimentConfig, params: PyTree, step: int) -> Exported:
    """The model of the checkpoint of a run, as its export would describe it."""
    return _exported(describe(config, params, step), config)


def read_description(path: Path) -> tuple[Exported, ExperimentConfig]:
    """What `describe` gave, and the config of the run, from a `config.json`.

    Raises:
      ValueError: the file is not that of an export, of another format version, or a field is
        missing, unknown or out of range; names the file.
    """
    described = read_json(path)
    if described.get("model_type") != "vlmae":
        kind = described.get("model_type")
        raise ValueError(f"{path}: model_type is {kind!r}, not 'vlmae'; see train.init")
    version = described.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version}, but {FORMAT_VERSION} is needed")
    missing = sorted({*Exported._fields, "experiment"} - described.keys())
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} is missing")
    try:
        whole = described["experiment"] | {"model": described["model"]}
        config = config_of(whole)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return _exported(described, config), config


def _exported(described: dict, config: ExperimentConfig) -> Exported:
    fields = {name: described[name] for name in Exported._fields}
    return Exported(**fields | {"model": config.model, "parts": tuple(described["parts"])})


def read_export_config(folder: Path) -> ExperimentConfig:
    """The config of the run that a folder is an export of.

    Raises:
      ValueError: see `read_description`.
    """
    return read_description(folder / "config.json")[1]


def load_export(folder: Path) -> tuple[PyTree, Exported]:
    """The parameters of an exported folder, as they were in the run, and what they belong to.

    Raises:
      ValueError: a file is damaged, of another version, a pickle; or a tensor is missing,
        unexpected or of another shape; names the file and the tensors.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; an export is one, and pickle files are not read")
    tensors = read_folder(folder)  # first of all: it says what to do about pickle files
    exported, _ = read_description(folder / "config.json")
    try:
        params = from_torch(tensors)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from error
    check_parameters(params, exported, folder / WEIGHTS)
    return params, exported


def check_parameters(params: PyTree, exported: Exported, source: Path) -> None:
    """Raises ValueError, with all differences in a line, unless the parameters are the model's."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {path_name(path): leaf.shape for path, leaf in leaves}
    expected = parameter_shapes(exported)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if found[name] != expected[name]:
            problems.append(f"{name} is {found[name]} instead of {expected[name]}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        shown = "; ".join(problems[:5])
        raise ValueError(f"{source} does not fit its config.json: {shown}{more}")


def parameter_shapes(exported: Exported) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the parts, by its path; nothing is computed."""
    plain = dataclasses.replace(exported.model, attention="xla")  # cudnn asks for a GPU at once
    model = VideoLanguageModel(plain, exported.image_size)
    video = exported.model.video
    # Who was trained on images alone has not the parts that only clips go through.
    has_time = video.time_frames > 0 or video.time_depth > 0
    is_clip = (TEMPORAL if has_time else "frame_selector") in exported.parts
    frames = 2 * video.layout.tubelet if is_clip else 1
    size, words = exported.image_size, min(4, exported.model.text.max_len)
    init = functools.partial(
        model.init, parts=exported.parts, num_options=exported.num_options, method=_use_parts
    )
    params = jax.eval_shape(
        init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, frames, size, size, 3), jnp.uint8),
        jax.ShapeDtypeStruct((1, words), jnp.int32),
        jax.ShapeDtypeStruct((1, words), jnp.bool_),
    )["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path): leaf.shape for path, leaf in leaves}


class _Inputs(NamedTuple):
    video: VideoFeatures
    text: TextFeatures
    ids: Int[Array, "b l"]
    fused: Float[Array, "b q d"] | None
    num_options: int


_USES: dict[str, Callable[[VideoLanguageModel, _Inputs], object]] = {
    "video_projection": lambda model, x: model.embed_video(x.video),
    "text_projection": lambda model, x: model.embed_text(x.text),
    "temperature": lambda model, x: model.temperature(),
    "match_head": lambda model, x: model.match(x.fused),
    "choice_head": lambda model, x: model.choose(x.fused, x.num_options),
    "word_transform": lambda model, x: model.predict_words(model.fused_words(x.text, x.fused)),
    "classifier": lambda model, x: model.classify(x.fused),
    "answer_decoder": lambda model, x: model.decode_answer(x.ids, x.text, x.fused),
    "pixel_decoder": lambda model, x: model.decode_pixels(x.video),
}


def _use_parts(
    model: VideoLanguageModel,
    video: UInt8[Array, "b f h w 3"],
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    parts: tuple[str, ...],
    num_options: int,
) -> None:
    """Calls the model's methods, so that these parts get parameters."""
    clip, text = model.encode_video(video), model.encode_text(ids, mask)
    fused = model.fuse(text, clip) if "fusion" in parts else None
    for name, use in _USES.items():
        if name in parts:
            use(model, _Inputs(clip, text, ids, fused, num_options))
