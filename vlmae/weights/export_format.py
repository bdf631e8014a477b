"""Exported folders: the contents of their `config.json`, and reading them back as parameters."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.checksum import check_sums
from data_pipelines.schema.classes import CLASSES_FILE
from data_pipelines.schema.config import DataConfig
from data_pipelines.schema.fields import Count, check_value
from data_pipelines.schema.json_files import read_json
from data_pipelines.text.tokenize import SPECIAL_FILES, TOKENIZER_FILE, VOCABULARY_FILE
from vlmae.config.experiment import ExperimentConfig, config_of
from vlmae.config.model import ModelConfig
from vlmae.config.tree import override
from vlmae.models.frame_selector import SELECTORS
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.parallel.sharding import shapes_by_path
from vlmae.weights.huggingface import WEIGHTS, read_folder
from vlmae.weights.torch_names import from_torch

FORMAT_VERSION = 1  # of config.json and of the names of the tensors; as in modeling_vlmae.py
SMALL_FILES = ("config.json", TOKENIZER_FILE, VOCABULARY_FILE, SPECIAL_FILES[0], CLASSES_FILE)
TEMPORAL = "video_encoder.temporal"
LOCAL_PATHS = {  # config fields that name files of the training machine -> their exported values
    "data.data_dir": DataConfig().data_dir,
    "data.tokenizer": "",  # it lies in the folder, as the classes do
    "data.classes": "",
    "train.init_from": "",
    "evaluation.labels": "",
}


class Exported(NamedTuple):
    """Description of the model in an exported folder, without its parameters."""

    model: ModelConfig
    image_size: int  # pixels
    parts: tuple[str, ...]  # top-level modules that the checkpoint holds
    num_options: int  # outputs of the multiple-choice head; 0 without one
    step: int  # of the checkpoint


def describe(config: ExperimentConfig, params: PyTree, step: int) -> dict:
    """Build the contents of `config.json` for the checkpoint of a run.

    The top-level fields serve readers without this library: frames, sizes and text length of
    evaluation, the parts of the model, and the template of multiple-choice questions. "model" and
    "experiment" are the run's config; paths of the training machine are left out.
    """
    experiment = dataclasses.asdict(override(config, LOCAL_PATHS))
    temporal = [TEMPORAL] if "temporal" in params.get("video_encoder", {}) else []
    # Baseline selectors have no parameters, so the tree does not show them.
    selector = config.model.selector.kind
    is_baseline = selector != "none" and not SELECTORS[selector].has_parameters
    selects = ["frame_selector"] if is_baseline else []
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
        "parts": sorted([*params, *temporal, *selects]),
        "model": experiment.pop("model"),
        "experiment": experiment,
    }


def exported_of(config: ExperimentConfig, params: PyTree, step: int) -> Exported:
    """Describe the checkpoint of a run as its export would."""
    return _exported(describe(config, params, step), config)


def read_description(folder: Path) -> tuple[Exported, ExperimentConfig]:
    """Read model description and run config from the `config.json` of an export.

    Raises:
      UserError: the file belongs to no export or to another format version, or a field is
        missing, unknown or out of range; names the file.
    """
    path = folder / "config.json"
    check_sums(folder, SMALL_FILES)  # the tensors are checked where they are read
    # Checks go from the folder's kind to its fields, so that the message names the first thing that
    # is wrong.
    described = read_json(path)
    # Checked before the version, which a folder of published weights does not have at all.
    if described.get("model_type") != "vlmae":
        kind = described.get("model_type")
        raise UserError(f"{path}: model_type is {kind!r}, not 'vlmae'; see train.init")
    version = described.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is {version!r}, but {FORMAT_VERSION} is needed")
    missing = sorted({*Exported._fields, "experiment"} - described.keys())
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} is missing")
    experiment, parts = described["experiment"], described["parts"]
    check(isinstance(experiment, dict), f"{path}: experiment must be an object")
    is_names = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    check(is_names, f"{path}: parts must be a list of names")
    try:
        for name in ("step", "image_size", "num_options"):
            check_value(Count, described[name], name)
        config = config_of(experiment | {"model": described["model"]})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    sizes = described["image_size"], config.data.image_size
    check(len({*sizes}) == 1, f"{path}: image_size is {sizes[0]}, but {sizes[1]} in the experiment")
    return _exported(described, config), config


def _exported(described: dict, config: ExperimentConfig) -> Exported:
    fields = {name: described[name] for name in Exported._fields}
    return Exported(**fields | {"model": config.model, "parts": tuple(described["parts"])})


def load_export(folder: Path) -> tuple[PyTree, Exported]:
    """Read parameters, bit for bit those of the run, and model description of an export.

    Raises:
      UserError: a file is damaged, of another version or a pickle, or a tensor is missing,
        unexpected or of another shape; names the file and the tensors.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; an export is one, and pickle files are not read")
    tensors = read_folder(folder)  # first, since its error says how to convert pickle files
    exported, _ = read_description(folder)
    try:
        params = from_torch(tensors)
    except UserError as error:
        raise UserError(f"{folder / WEIGHTS}: {error}") from error
    check_parameters(params, exported, folder / WEIGHTS)
    return params, exported


def check_parameters(params: PyTree, exported: Exported, source: Path) -> None:
    """Check names and shapes of the parameters against the described model.

    Raises:
      UserError: they differ; lists up to five differences in one line.
    """
    found, expected = shapes_by_path(params), parameter_shapes(exported)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        # Shapes as well as names: a config edited by hand has the same names.
        if found[name] != expected[name]:
            problems.append(f"{name} is {found[name]} instead of {expected[name]}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        shown = "; ".join(problems[:5])
        raise UserError(f"{source} does not fit its config.json: {shown}{more}")


def parameter_shapes(exported: Exported) -> dict[str, tuple[int, ...]]:
    """Derive the shape of every parameter from the description, by tracing the model.

    Returns:
      Path ("match_head/kernel") -> shape. No parameter is allocated.
    """
    # cuDNN's attention needs a GPU even for tracing.
    plain = dataclasses.replace(exported.model, attention="xla")
    model = VideoLanguageModel(plain, exported.image_size)
    video = exported.model.video
    # A run on images alone never created the modules of time and of frame selection, so tracing
    # it with a clip would expect too many parameters.
    has_time = video.time_frames > 0 or video.time_depth > 0
    is_clip = (TEMPORAL if has_time else "frame_selector") in exported.parts
    # The fewest frames that make a clip of more than one time step.
    frames = 2 * video.layout.tubelet if is_clip else 1
    # The number of tokens changes no shape, so a few spare time in tracing.
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
    return shapes_by_path(params)


class _Inputs(NamedTuple):
    """Features from which the heads are called."""

    video: VideoFeatures
    text: TextFeatures
    ids: Int[Array, "b l"]
    fused: Float[Array, "b q d"] | None
    num_options: int


# Part -> a call that creates its parameters; encoders and fusion are called in `_use_parts`.
_USES: dict[str, Callable[[VideoLanguageModel, _Inputs], object]] = {
    "video_projection": lambda model, x: model.embed_video(x.video),
    "text_projection": lambda model, x: model.embed_text(x.text),
    "temperature": lambda model, _: model.temperature(),
    "logit_bias": lambda model, _: model.logit_bias(),
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
    """Call the methods that create the parameters of these parts."""
    clip, text = model.encode_video(video), model.encode_text(ids, mask)
    fused = model.fuse(clip, text) if "fusion" in parts else None
    for name, use in _USES.items():
        if name in parts:
            use(model, _Inputs(clip, text, ids, fused, num_options))
