"""Single encoders as stock models of transformers, where one of its classes computes the same."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from data_pipelines.schema.checks import UserError
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.model import ModelConfig, VideoEncoderConfig
from vlmae.models.embeddings import sincos_positions
from vlmae.weights.families import FAMILIES, Family
from vlmae.weights.huggingface import differences
from vlmae.weights.tensors import read_tensors, write_tensors
from vlmae.weights.torch_names import Tensors

VIDEO_FAMILIES = ("vit", "deit", "dinov2", "clip_vision_model", "beit", "videomae")


class Stock(NamedTuple):
    """Encoder under the names and with the config.json of a class of transformers."""

    part: str  # "text" or "video"
    model_class: str  # of transformers
    config: dict[str, Any]  # its config.json
    tensors: Tensors


def stock_text(config: ExperimentConfig, params: PyTree) -> Stock:
    """Convert the text encoder to a `BertModel` without a pooler.

    Raises:
      UserError: the encoder computes something that no BertModel does: says what.
    """
    text = config.model.text
    if text.adapter.is_used:
        raise UserError("the text encoder is no BertModel: model.text.adapter adds to its layers")
    if text.layout.pre_norm or text.layout.causal:
        layout = f"pre_norm={text.layout.pre_norm}, causal={text.layout.causal}"
        raise UserError(f"the text encoder is no BertModel: model.text.layout has {layout}")
    return _stock("bert", config, {"text_encoder": params["text_encoder"]}, config.model)


def stock_video(config: ExperimentConfig, params: PyTree) -> Stock:
    """Convert the video encoder to the first of `VIDEO_FAMILIES` that computes the same.

    Fixed positions become learned ones of equal values, where the class has no others.

    Raises:
      UserError: no class of transformers computes the same: says why.
    """
    video, encoder = config.model.video, params["video_encoder"]
    # First what no class has at all: the nearest class would be a misleading hint.
    reasons = "; ".join(no_class_has(video))
    if reasons:
        raise UserError(f"no class of transformers is this video encoder: {reasons}")
    side = config.data.image_size // video.patch_size
    choices = [(video, encoder)]
    if video.positions in ("sincos", "none"):
        # As a table of learned positions [prefix + n, d]; zeros where there are none.
        table = sincos_positions(side, side, video.width) * np.float32(video.positions == "sincos")
        # Zeros for [CLS], as in MAE's fixed table.
        table = np.pad(table, ((video.layout.prefix, 0), (0, 0)))
        learned = dataclasses.replace(video, positions="learned")
        choices.append((learned, encoder | {"positions": table}))
    misfits: dict[str, list[str]] = {}  # class -> reasons, to name the nearest one
    # Plain ViT comes first, as the one that most tools read.
    for model_type in VIDEO_FAMILIES:
        for candidate, candidate_params in choices:
            wrong = list(misfit(FAMILIES[model_type], candidate, config))
            if not wrong:
                model = dataclasses.replace(config.model, video=candidate)
                return _stock(model_type, config, {"video_encoder": candidate_params}, model)
            misfits[FAMILIES[model_type].model_class] = wrong
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    raise UserError(
        f"no class of transformers is this video encoder; for a {nearest} "
        f"model.video.{', model.video.'.join(misfits[nearest])}"
    )


def no_class_has(video: VideoEncoderConfig) -> Iterator[str]:
    """Yield a line for each thing that no published family computes."""
    if video.adapter.is_used:
        yield "model.video.adapter adds to its blocks"
    keep_rate = video.sparsify.eval_keep_rate
    if keep_rate < 1:
        yield f"it prunes its tokens (model.video.sparsify.eval_keep_rate={keep_rate})"
    for name in ("time_frames", "time_depth"):
        if getattr(video, name):
            yield f"it mixes frames over time (model.video.{name}={getattr(video, name)})"


def misfit(family: Family, video: VideoEncoderConfig, config: ExperimentConfig) -> Iterator[str]:
    """Yield a line for each field of the encoder that the family's class treats differently."""
    written = family.published(video, config.data.image_size, config.data.eval.num_frames)
    fields = family.fields(family.complete(written))
    layout = video.layout  # mean and std do not matter: stock models get normalized pixels
    pixels = {"pixel_mean": layout.pixel_mean, "pixel_std": layout.pixel_std}
    fields["layout"] = dataclasses.replace(fields["layout"], **pixels)
    return differences(fields, video)


def _stock(model_type: str, config: ExperimentConfig, params: PyTree, model: ModelConfig) -> Stock:
    """Rename the parameters to those of a family; an error if one has no name there."""
    family = FAMILIES[model_type]
    tensors = write_tensors(params, family, model)
    # Read back, since the rules leave out parameters that they do not know.
    read = read_tensors(tensors, family, model).params
    # Both ways: a parameter without a place, or a place that nothing fills.
    lost = flatten_dict(params, sep="/").keys() ^ flatten_dict(read, sep="/").keys()
    if lost:
        names = ", ".join(sorted(lost)[:5])
        raise UserError(f"a {family.model_class} has no place for {names}")
    frames = config.data.eval.num_frames
    part = getattr(model, family.part)
    written = family.published(part, config.data.image_size, frames)
    header = {"model_type": model_type, "architectures": [family.model_class], "dtype": "float32"}
    return Stock(family.part, family.model_class, header | written, tensors)
