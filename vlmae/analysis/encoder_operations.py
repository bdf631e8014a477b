"""Operations of the encoders per clip or text: what `operations` counts, and what it does not."""

import itertools
from typing import NamedTuple

from vlmae.analysis.products import Layer, Operations, added, attention, block, dense, pairs
from vlmae.config import ExperimentConfig
from vlmae.masking import num_keep
from vlmae.model_config import AdapterConfig, ModelConfig, VideoEncoderConfig
from vlmae.sparsify import num_survivors


class Clip(NamedTuple):
    """How many tokens a clip has."""

    times: int  # frames, or tubelets of frames
    patches: int  # of a frame
    visible: int  # patches of a frame that the mask leaves
    tokens: int  # of a frame after the encoder, [CLS] not among them
    read_times: int  # frames that a fusion reads


def clip_shape(config: ExperimentConfig, num_frames: int) -> Clip:
    """The tokens of a clip of `num_frames` frames in training."""
    video, selector = config.model.video, config.model.selector
    times = max(1, num_frames // video.layout.tubelet)
    patches = (config.data.image_size // video.patch_size) ** 2
    masks = video.mask.scheme != "none" and video.mask.ratio > 0
    visible = num_keep(patches, video.mask.ratio) if masks else patches
    chooses = selector.kind != "none" and times > 1
    return Clip(
        times=times,
        patches=patches,
        visible=visible,
        tokens=tokens_by_block(video, visible)[-1],
        read_times=selector.count(times) if chooses else times,
    )


def survivors(video: VideoEncoderConfig, i: int, tokens: int) -> int:
    """How many of a frame's `tokens` patch tokens block `i` keeps, a fused one not counted."""
    thins = video.sparsify.keep_rate < 1 and i in video.sparsify.stages
    return num_survivors(tokens, video.sparsify.keep_rate) if thins else tokens


def tokens_by_block(video: VideoEncoderConfig, visible: int) -> list[int]:
    """A frame's patch tokens before each block and, last, after all of them."""
    counts = [visible]
    for i in range(video.depth):
        kept = survivors(video, i, counts[-1])
        counts.append(kept + (kept < counts[-1] and video.sparsify.rest == "fuse"))
    return counts


def video_encoder(model: ModelConfig, clip: Clip) -> Operations:
    """Patch embedding and blocks of all frames."""
    video = model.video
    layer = Layer(video.width, video.mlp_dim, pre_norm=True, remat=model.remat)
    rows = 1 if video.layout.joint else clip.times
    total = dense(
        clip.times * clip.visible,
        video.patch_pixels,
        video.width,
        learned=video.adapter.frozen_blocks == 0,
        upstream=False,
    )
    counts = tokens_by_block(video, clip.visible)
    for i, (entering, leaving) in enumerate(itertools.pairwise(counts)):
        before, after = (
            (clip.times * n if video.layout.joint else video.layout.prefix + n)
            for n in (entering, leaving)
        )
        flags = takes_gradients(video.adapter, i)
        total += block(layer, before, survivors=after, **flags).times(rows)
        total += thinning(model, i, entering, any(flags.values())).times(rows)
        total += adapter(video.adapter, i, after, video.width).times(rows)
    chunk = video.frames_per_chunk
    return total.computed_again(total.forward) if 0 < chunk < clip.times else total


def thinning(model: ModelConfig, i: int, tokens: int, flows: bool) -> Operations:
    """The scores of a frame's `tokens` in block `i`, and the sum of those that it does not keep.

    Scores take a gradient through the weights of that sum alone; `flows`: the block takes any.
    """
    video = model.video
    if survivors(video, i, tokens) == tokens:
        return Operations()
    fuses, score = video.sparsify.rest == "fuse", video.sparsify.score
    rows = {"cls_attention": 1, "mean_attention": tokens + 1}.get(score, 0)
    weighs = score != "random"
    total = pairs(rows, tokens + 1, video.width, gradients=2 * (fuses and flows))
    total += pairs(fuses, tokens, video.width, gradients=(1 + weighs) * flows)
    return total._replace(again=(model.remat != "none") * flows * total.forward)


def temporal_blocks(model: ModelConfig, clip: Clip) -> Operations:
    """Blocks over the frames of each place, or over all tokens of a clip under a mask."""
    video, places = model.video, clip.tokens + 1
    if clip.times == 1:
        return Operations()
    layer = Layer(video.width, video.mlp_dim, pre_norm=True, remat=model.remat)
    same_places = clip.visible == clip.patches or video.mask.scheme == "tube"
    thins = video.sparsify.keep_rate < 1
    if same_places and not thins:
        return block(layer, clip.times).times(places * video.time_depth)
    return block(layer, clip.times * places).times(video.time_depth)


def text_layer(model: ModelConfig) -> Layer:
    """A layer of the text encoder, which fusions and the answer decoder have too."""
    return Layer(model.text.width, model.text.mlp_dim, pre_norm=False, remat=model.remat)


def text_learns(model: ModelConfig) -> bool:
    """Whether any part of the text encoder takes gradients."""
    frozen, kind = model.text.adapter.frozen_blocks, model.text.adapter.kind
    return frozen < model.text.depth or kind != "none"


def text_encoder(model: ModelConfig, length: int) -> Operations:
    """All layers for one text of `length` tokens."""
    text, layer = model.text, text_layer(model)
    return added(
        *(
            block(layer, length, **takes_gradients(text.adapter, i))
            + adapter(text.adapter, i, length, text.width)
            for i in range(text.depth)
        )
    )


def takes_gradients(adapter: AdapterConfig, i: int) -> dict[str, bool]:
    """Whether parameters (`learned`) and input (`upstream`) of an encoder's block `i` take any."""
    frozen, kind = adapter.frozen_blocks, adapter.kind
    if i < frozen:
        return {"learned": False, "upstream": kind == "inline" and i > 0}
    return {"learned": True, "upstream": not (i == frozen > 0 and kind == "none")}


def adapter(config: AdapterConfig, i: int, tokens: int, width: int) -> Operations:
    """The adapter of block `i`, if it has one."""
    if i >= config.frozen_blocks or config.kind == "none":
        return Operations()
    down, up = dense(tokens, width, config.width), dense(tokens, config.width, width)
    return down + attention(tokens, tokens, config.width, config.width) + up
