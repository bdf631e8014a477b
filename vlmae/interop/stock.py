"""One encoder of a model as a model of transformers, where one of its classes computes the same."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from vlmae.config import ExperimentConfig
from vlmae.interop.families import FAMILIES, Family
from vlmae.interop.published import differences
from vlmae.interop.tensors import read_tensors, write_tensors
from vlmae.interop.torch_names import Tensors
from vlmae.model_config import AdapterConfig, ModelConfig, VideoEncoderConfig
from vlmae.models.embeddings import sincos_positions

VIDEO_FAMILIES = ("vit", "deit", "dinov2", "clip_vision_model", "beit", "videomae")


class Stock(NamedTuple):
    """An encoder under published names."""

    part: str  # "text" or "video"
    model_class: str  # of transformers
    config: dict[str, Any]  # its config.json
    tensors: Tensors


def stock_text(config: ExperimentConfig, params: PyTree) -> Stock:
    """The text encoder as a `BertModel` without a pooler.

    Raises:
      ValueError: no BertModel computes what it does: says why.
    """
    text = config.model.text
    if has_adapters(text.adapter):
        raise ValueError("the text encoder is no BertModel: model.text.adapter adds to its layers")
    return _stock("bert", config, {"text_encoder": params["text_encoder"]}, config.model)


def stock_video(config: ExperimentConfig, params: PyTree) -> Stock:
    """The video encoder as the first of `VIDEO_FAMILIES` that computes the same.

    Fixed positions become learned ones of equal values, where the class has no others.

    Raises:
      ValueError: no class of transformers computes what it does: says why.
    """
    video, encoder = config.model.video, params["video_encoder"]
    reasons = "; ".join(no_class_has(video))
    if reasons:
        raise ValueError(f"no class of transformers is this video encoder: {reasons}")
    side = config.data.image_size // video.patch_size
    choices = [(video, encoder)]
    if video.positions in ("sincos", "none"):
        learned = dataclasses.replace(video, positions="learned")
        choices.append((learned, encoder | {"positions": fixed_positions(video, side)}))
    misfits: dict[str, list[str]] = {}
    for model_type in VIDEO_FAMILIES:
        for candidate, candidate_params in choices:
            wrong = list(misfit(FAMILIES[model_type], candidate, config))
            if not wrong:
                model = dataclasses.replace(config.model, video=candidate)
                return _stock(model_type, config, {"video_encoder": candidate_params}, model)
            misfits[FAMILIES[model_type].model_class] = wrong
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    raise ValueError(
        f"no class of transformers is this video encoder; for a {nearest} "
        f"model.video.{', model.video.'.join(misfits[nearest])}"
    )


def has_adapters(adapter: AdapterConfig) -> bool:
    """True if an encoder's blocks are not all that it computes."""
    return adapter.frozen_blocks > 0 and adapter.kind != "none"


def no_class_has(video: VideoEncoderConfig) -> Iterator[str]:
    """What none of the published families has, one line each."""
    if has_adapters(video.adapter):
        yield "model.video.adapter adds to its blocks"
    keep_rate = video.sparsify.eval_keep_rate
    if keep_rate < 1:
        yield f"it thins its tokens (model.video.sparsify.eval_keep_rate={keep_rate})"
    for name in ("time_frames", "time_depth"):
        if getattr(video, name):
            yield f"it lets frames know each other (model.video.{name}={getattr(video, name)})"


def misfit(family: Family, video: VideoEncoderConfig, config: ExperimentConfig) -> Iterator[str]:
    """Fields of the encoder that the family's class would compute otherwise, one line each."""
    written = family.published(video, config.data.image_size, config.data.eval.num_frames)
    fields = family.fields(family.complete(written))
    layout = video.layout  # pixels are normalized before the model, by any mean
    pixels = {"pixel_mean": layout.pixel_mean, "pixel_std": layout.pixel_std}
    fields["layout"] = dataclasses.replace(fields["layout"], **pixels)
    return differences(fields, video)


def fixed_positions(video: VideoEncoderConfig, side: int) -> np.ndarray:
    """The positions of a frame's tokens as a table of learned ones [prefix + n, d]."""
    table = sincos_positions(side, side, video.width) * np.float32(video.positions == "sincos")
    return np.pad(table, ((video.layout.prefix, 0), (0, 0)))


def _stock(model_type: str, config: ExperimentConfig, params: PyTree, model: ModelConfig) -> Stock:
    """The parameters under the names of a family; refuses if any has none."""
    family = FAMILIES[model_type]
    tensors = write_tensors(params, family, model)
    read = read_tensors(tensors, family, model).params
    lost = flatten_dict(params, sep="/").keys() ^ flatten_dict(read, sep="/").keys()
    if lost:
        names = ", ".join(sorted(lost)[:5])
        raise ValueError(f"a {family.model_class} has no place for {names}")
    frames = config.data.eval.num_frames
    part = getattr(model, family.part)
    written = family.published(part, config.data.image_size, frames)
    header = {"model_type": model_type, "architectures": [family.model_class], "dtype": "float32"}
    return Stock(family.part, family.model_class, header | written, tensors)
