"""What the `config.json` of an exported folder says, and the parameters that follow from it."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from vlmae.config import ExperimentConfig
from vlmae.config_tree import from_dict
from vlmae.model_config import ModelConfig
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.sharding import path_name

FORMAT_VERSION = 1  # of config.json and of the names of the tensors; as in torch_model.py
TEMPORAL = "video_encoder.temporal"


class Exported(NamedTuple):
    """The model of an exported folder, apart from its parameters."""

    model: ModelConfig
    image_size: int  # pixels
    parts: tuple[str, ...]  # of the model; those that the checkpoint holds
    num_options: int  # that the head of multiple choice tells apart; 0: there is none
    step: int  # of the checkpoint


def describe(config: ExperimentConfig, params: PyTree, step: int) -> dict:
    """The contents of `config.json` for the checkpoint of a run."""
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
        "options": config.objectives.mcm_template if head else "",
        "parts": sorted([*params, *temporal, *chooses]),
        "model": dataclasses.asdict(config.model),
    }


def read_description(described: dict, path: Path) -> Exported:
    """The inverse of `describe`.

    Raises:
      ValueError: another format version, or a field that is missing, unknown or out of range;
        names the file.
    """
    version = described.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version}, but {FORMAT_VERSION} is needed")
    fields = {name: described[name] for name in Exported._fields if name in described}
    missing = sorted(set(Exported._fields) - set(fields))
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} is missing")
    try:
        fields["model"] = from_dict(ModelConfig, fields["model"], "model")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Exported(**fields | {"parts": tuple(fields["parts"])})


def parameter_shapes(exported: Exported) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the parts, by its path; nothing is computed."""
    model = VideoLanguageModel(exported.model, exported.image_size)
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
