"""Features of a batch that objectives share: the encoded video, the encoded text, masked tokens."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Key

from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ObjectivesConfig
from vlmae.config.objectives import OBJECTIVES
from vlmae.models.text_encoder import TextFeatures
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel
from vlmae.ops import losses
from vlmae.ops.masking import PatchMask, draw_mask

Keys = Mapping[str, Key[Array, ""]]


class Context(NamedTuple):
    """Inputs of an objective beside the model and the features."""

    batch: Batch
    key: Key[Array, ""]  # of this objective in this step
    config: ObjectivesConfig
    shards: int = 1  # parts into which devices split the batch: the scope of "local"


class Loss(NamedTuple):
    """Scalar to minimize, and metrics to report beside it."""

    value: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    weight: Array | float = 1.0
    """Number of rows, pairs, patches or tokens of which `value` and metrics are the means. Parts of
    a batch are averaged by it, so that they leave no trace."""
    weights: Mapping[str, Array | float] = {}
    """Weights of the metrics that are means of something else."""


class FusedPairs(NamedTuple):
    """Text-video pairs after the fusion; None for what no objective reads."""

    tokens: Float[Array, "b 3 q d"] | None  # matched, with a hard video, with a hard text
    mask: Bool[Array, "b 3"] | None  # True for pairs that count: row valid, negative found
    masked_text: Float[Array, "b q d"] | None  # masked text with its own video


class Features(NamedTuple):
    """Encoder outputs of a batch; all objectives share them."""

    video: VideoFeatures
    text: TextFeatures  # of the caption; of the masked one unless an objective `reads_caption`
    masked_tokens: losses.MaskedTokens | None = None  # ids and targets; None without MLM
    masked_text: TextFeatures | None = None
    fused: FusedPairs | None = None  # see `vlmae.training.pairs.fuse_pairs`


def sample_mask(model: VideoLanguageModel, batch: Batch, key: Key[Array, ""]) -> PatchMask | None:
    """Draw the visual mask of a training batch; None if the config removes no patch."""
    config = model.config.video.mask
    if config.scheme == "none" or config.ratio == 0:
        return None
    # Drawn here and passed in: the model itself never masks, so evaluation cannot by mistake.
    rows, frames = batch.video.shape[:2]
    shape = (rows, model.num_times(frames), *model.grid)
    return draw_mask(key, config.scheme, config.ratio, shape)


def mask_tokens(
    model: VideoLanguageModel, batch: Batch, key: Key[Array, ""], ratio: float
) -> losses.MaskedTokens:
    """Mask tokens of the captions (BERT); never [CLS], padding, or tokens of padding rows.

    `ratio` is the fraction of the tokens to predict.
    """
    text = model.config.text
    return losses.mask_tokens(
        key,
        batch.text_ids,
        batch.text_mask & batch.valid[:, None] & (batch.text_ids != text.cls_id),
        ratio=ratio,
        mask_id=text.mask_id,
        vocab_size=text.vocab_size,
    )


def extract(
    model: VideoLanguageModel, batch: Batch, keys: Keys, config: ObjectivesConfig
) -> Features:
    """Encode a batch: video through a fresh mask, text as given and with masked tokens.

    Only what objectives of non-zero weight read is encoded. `keys` holds "mask" for the visual
    mask and "mlm" for the masked tokens.
    """
    video = model.encode_video(batch.video, sample_mask(model, batch, keys["mask"]))
    if not config.need("masked_text"):
        return Features(video, model.encode_text(batch.text_ids, batch.text_mask))
    masked = mask_tokens(model, batch, keys["mlm"], config.mlm_ratio)
    if not config.reads_caption:
        text = model.encode_text(masked.ids, batch.text_mask)
        return Features(video, text, masked, text)
    # One pass for both: half the program, and only one use of the encoder whose gradients devices
    # sum. The two texts of a row stay neighbors, so that they stay on the row's device.
    ids = rearrange([batch.text_ids, masked.ids], "c b l -> (b c) l")
    both = model.encode_text(ids, repeat(batch.text_mask, "b l -> (b c) l", c=2))
    text, masked_text = map(
        TextFeatures, *(rearrange(x, "(b c) ... -> c b ...", c=2) for x in both)
    )
    return Features(video, text, masked, masked_text)


def keys_of(key: Key[Array, ""]) -> Keys:
    """Split the key of a step: "mask" for the visual mask, and one key for each objective.

    Objectives that are added at the end change no other's key.
    """
    # One split for all, whether they are trained or not: switching one off leaves the draws of the
    # others as they were.
    names = ("mask", *OBJECTIVES)
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))
