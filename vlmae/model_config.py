"""The model as data: sizes and options of every part. Field docstrings become the `--help` text."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from data_pipelines.config import check

Remat = Literal["none", "selective", "full"]


def check_sizes(where: str, config: Any, *fields: str) -> None:
    """Raises ValueError, naming the field, for one that is not at least 1."""
    for name in fields:
        value = getattr(config, name)
        check(value >= 1, f"{where}.{name} must be at least 1, not {value}")


def check_attention(where: str, config: Any) -> None:
    """Raises ValueError, naming the fields, unless the heads of attention divide the width."""
    check_sizes(where, config, "width", "num_heads")
    check(
        config.width % config.num_heads == 0,
        f"{where}.num_heads={config.num_heads} does not divide {where}.width={config.width}",
    )


@dataclass(frozen=True)
class MaskConfig:
    """Which patches the video encoder does not see during training."""

    scheme: Literal["random", "tube", "grid", "none"] = "random"
    """random: per frame; tube: one mask per clip; grid: one visible patch per cell; none."""
    ratio: float = 0.65
    """Fraction of the patches removed; grid needs 1 - 1/s^2 (0.75, 0.8889, 0.9375, ...)."""

    def __post_init__(self):
        check(0 <= self.ratio < 1, f"mask.ratio must be in [0, 1), not {self.ratio}")
        if self.scheme == "grid":
            cell = round(1 / math.sqrt(1 - self.ratio))
            check(
                cell > 1 and abs(self.ratio - (1 - 1 / cell**2)) < 1e-3,
                f"mask.ratio={self.ratio} does not fit the grid scheme: use 0.75, 0.8889 or 0.9375",
            )


@dataclass(frozen=True)
class SparsifyConfig:
    """Thinning of a frame's tokens inside the video encoder, apart from masking; off by default."""

    keep_rate: float = 1.0
    """Fraction of the tokens that each stage keeps in training; 1 is off, 0.7 SMAUG's file."""
    eval_keep_rate: float = 1.0
    """The same in evaluation."""
    stages: tuple[int, ...] = (3, 6, 9)
    """Blocks, counted from 0, that thin between their attention and their feed-forward network."""
    score: Literal["cls_attention", "mean_attention", "norm", "random"] = "cls_attention"
    """What makes a token important; norm and random are baselines."""
    rest: Literal["fuse", "drop"] = "fuse"
    """What becomes of the other tokens: one token, their sum weighted by score; or nothing."""
    warmup_rates: tuple[float, ...] = ()
    """Keep rates of equal parts of the warm-up, one compilation each; empty: no warm-up."""
    warmup_steps: int = 0
    """Steps until `keep_rate` itself holds."""

    def __post_init__(self):
        for name in ("keep_rate", "eval_keep_rate"):
            rate = getattr(self, name)
            check(0 < rate <= 1, f"sparsify.{name} must be in (0, 1], not {rate}")
        for i, rate in enumerate(self.warmup_rates):
            check(0 < rate <= 1, f"sparsify.warmup_rates.{i} must be in (0, 1], not {rate}")
        check(self.warmup_steps >= 0, f"sparsify.warmup_steps is negative: {self.warmup_steps}")
        check(
            bool(self.warmup_rates) == (self.warmup_steps > 0),
            f"sparsify.warmup_rates={self.warmup_rates} and sparsify.warmup_steps="
            f"{self.warmup_steps} go together",
        )
        check(
            self.stages == tuple(sorted(set(self.stages))) and all(s >= 0 for s in self.stages),
            f"sparsify.stages={self.stages} must be ascending block numbers from 0",
        )

    @property
    def is_used(self) -> bool:
        """True if any rate thins anything, in training or in evaluation."""
        return min(self.keep_rate, self.eval_keep_rate, *self.warmup_rates, 1.0) < 1


@dataclass(frozen=True)
class AdapterConfig:
    """Which shallow blocks of an encoder are frozen, and what finetunes their features instead."""

    frozen_blocks: int = 0
    """First blocks that are not trained, with the embeddings below them; 0 freezes nothing."""
    kind: Literal["none", "side", "inline"] = "side"
    """side: adapters beside the frozen blocks, added after the last one, which keeps none of their
    activations; inline: an adapter after each frozen block; none: frozen without adapters."""
    width: int = 96
    """Width of the adapters' bottleneck."""
    num_heads: int = 4
    """Attention heads of an adapter; must divide its width."""

    def __post_init__(self):
        check(
            self.frozen_blocks >= 0,
            f"adapter.frozen_blocks must not be negative: {self.frozen_blocks}",
        )
        check_attention("adapter", self)


@dataclass(frozen=True)
class VitLayout:
    """What differs between the published families of vision transformers; the default is MAE's.

    `vlmae.interop` reads it from their files (`python -m vlmae.interop FOLDER` prints it).
    """

    eps: float = 1e-6
    """Of the encoder's layer norms."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Of the feed-forward networks; quick_gelu is x sigmoid(1.702 x) (CLIP)."""
    layer_scale: float = 0.0
    """Initial factor of what a block adds, learned by channel (DINOv2, BEiT); 0 has none."""
    input_norm: bool = False
    """A layer norm before the first block (CLIP)."""
    cls_token: bool = True
    """Whether [CLS] leads the tokens of a frame (VideoMAE has none)."""
    extra_tokens: int = 0
    """Further learned tokens, dropped after the last block (DeiT: one, for distillation)."""
    frame_cls: Literal["token", "mean"] = "token"
    """What stands for a frame: [CLS], or the mean of its patches, normed (BEiT, VideoMAE)."""
    relative_bias: Literal["none", "layer", "shared"] = "none"
    """Attention biases by relative position: a table in each block, or one for all (BEiT)."""
    tubelet: int = 1
    """Frames that a patch covers (VideoMAE: 2); a single image is repeated."""
    joint: bool = False
    """Attention over all frames of a clip at once (VideoMAE), in place of each frame alone."""
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the RGB channels in [0, 1] that is taken off; ImageNet's."""
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the RGB channels by which is divided; ImageNet's."""

    def __post_init__(self):
        check(self.eps > 0, f"layout.eps must be positive, not {self.eps}")
        check(self.layer_scale >= 0, f"layout.layer_scale is negative: {self.layer_scale}")
        check(self.extra_tokens >= 0, f"layout.extra_tokens is negative: {self.extra_tokens}")
        check(self.tubelet >= 1, f"layout.tubelet must be at least 1, not {self.tubelet}")
        check(min(self.pixel_std) > 0, f"layout.pixel_std must be positive: {self.pixel_std}")
        bare = not self.cls_token and not self.extra_tokens
        check(
            self.cls_token or (bare and self.frame_cls == "mean" and self.relative_bias == "none"),
            "layout.cls_token=False goes with frame_cls=mean, no extra_tokens and no relative_bias",
        )
        check(bare or not self.joint, "layout.joint needs layout.cls_token=False")
        check(
            not self.extra_tokens or self.relative_bias == "none",
            "layout.relative_bias knows [CLS] and patches alone: not with layout.extra_tokens",
        )

    @property
    def prefix(self) -> int:
        """Tokens of a frame that stand before its patches inside the encoder."""
        return int(self.cls_token) + self.extra_tokens


@dataclass(frozen=True)
class VideoEncoderConfig:
    """A ViT applied to every frame alone; the default is B/16."""

    width: int = 768
    """Width of a token."""
    depth: int = 12
    """Transformer blocks."""
    num_heads: int = 12
    """Attention heads; must divide the width."""
    mlp_dim: int = 3072
    """Hidden width of the feed-forward network."""
    patch_size: int = 16
    """Side of a square patch in pixels."""
    positions: Literal["sincos", "learned", "sincos_clip", "none"] = "sincos"
    """sincos: fixed, 2-D, of the patches of a frame (MAE); learned: of [CLS], extra tokens and
    patches (ViT); sincos_clip: fixed, 1-D, of all patches of a clip (VideoMAE); none (BEiT)."""
    layout: VitLayout = VitLayout()
    """How the encoder differs from MAE's."""
    mask: MaskConfig = MaskConfig()
    """Visual masking, training only."""
    sparsify: SparsifyConfig = SparsifyConfig()
    """Thinning of the tokens between the blocks."""
    adapter: AdapterConfig = AdapterConfig()
    """Frozen shallow blocks; none by default."""
    frames_per_chunk: int = 0
    """Frames of a clip that are encoded at a time, each chunk again in the backward pass, so that
    memory does not grow with the activations of all frames; 0 encodes all at once."""
    time_frames: int = 0
    """Length of the temporal embeddings, interpolated for clips of another length; 0 has none."""
    time_init: Literal["zeros", "sincos"] = "zeros"
    """What the temporal embeddings start from. zeros leaves weights trained on images as they are,
    but from scratch a model may not find out about the order of time for long."""
    time_depth: int = 0
    """Blocks of attention over the frames at the same place, after the spatial ones; 0 has none."""

    @property
    def patch_pixels(self) -> int:
        """Values of a patch."""
        return 3 * self.layout.tubelet * self.patch_size**2


@dataclass(frozen=True)
class TextEncoderConfig:
    """The lower layers of a BERT-shaped encoder; width, heads and dropout hold for the fusion."""

    vocab_size: int = 0
    """WordPiece vocabulary; 0 takes the tokenizer's, and its special ids, at the start."""
    cls_id: int = 101
    """Word id of [CLS]."""
    mask_id: int = 103
    """Word id of [MASK]."""
    max_len: int = 512
    """Positions that the embedding table holds."""
    width: int = 768
    """Width of a token."""
    depth: int = 9
    """Transformer layers before the fusion."""
    num_heads: int = 12
    """Attention heads; must divide the width."""
    mlp_dim: int = 3072
    """Hidden width of the feed-forward network."""
    dropout: float = 0.1
    """Dropout after embeddings, attention and feed-forward, training only."""
    pooling: Literal["cls", "mean"] = "cls"
    """What of a text goes to the shared space of VTC: its [CLS], or the mean of its tokens, as in
    sentence-transformers (MiniLM), whose [CLS] is nearly the same for all texts."""
    adapter: AdapterConfig = AdapterConfig()
    """Frozen shallow layers; none by default."""


@dataclass(frozen=True)
class FrameSelectorConfig:
    """Which frames of a clip the fusion reads; images and VTC are not concerned."""

    kind: Literal["none", "mlp", "transformer", "uniform", "random"] = "none"
    """mlp: scores from the [CLS] of frame and text; transformer: from all frames and the text
    together; uniform, random: baselines; none keeps all frames."""
    frames: int = 0
    """Frames that are kept; 0 keeps half of them, at least one."""
    width: int = 256
    """Width of the transformer scorer."""
    depth: int = 2
    """Blocks of the transformer scorer."""
    num_heads: int = 4
    """Attention heads of the transformer scorer; must divide its width."""

    def __post_init__(self):
        check(self.frames >= 0, f"selector.frames must not be negative: {self.frames}")
        check_sizes("selector", self, "depth")
        check_attention("selector", self)

    def count(self, num_frames: int) -> int:
        """Frames kept of a clip of `num_frames`."""
        return min(num_frames, self.frames or max(1, num_frames // 2))


@dataclass(frozen=True)
class SamplerConfig:
    """How the multiway fusion condenses text and video before it fuses them (MuLTI)."""

    video_latents: int = 64
    """Tokens into which a clip is condensed, whatever its length."""
    text_latents: int = 16
    """Tokens into which a text is condensed."""
    pooling: Literal["block", "global", "mean", "attention", "none"] = "block"
    """What the latents start from beside their learned queries: blocks of the sequence pooled by
    importance; all of it pooled; the mean of each block; what the queries attend to; nothing."""
    guidance: Literal["context", "queries", "none"] = "context"
    """Where the condensed text enters the condensing of the video."""
    share_attention: bool = True
    """One attention for text, video and fusion in each layer, or one for each of them."""

    def __post_init__(self):
        check_sizes("fusion.sampler", self, "video_latents", "text_latents")


@dataclass(frozen=True)
class FusionConfig:
    """How text and video tokens meet."""

    kind: Literal["cross_attention", "concat", "multiway"] = "cross_attention"
    """cross_attention: text queries attend to the video (SMAUG); concat: self-attention over both
    (ALPRO, a baseline); multiway: both condensed to latents first (MuLTI)."""
    depth: int = 3
    """Layers; with multiway those of the samplers too."""
    sampler: SamplerConfig = SamplerConfig()
    """Only used by multiway."""

    def __post_init__(self):
        check_sizes("fusion", self, "depth")


@dataclass(frozen=True)
class PixelDecoderConfig:
    """The light transformer that reconstructs removed patches."""

    width: int = 384
    """Width of a token."""
    depth: int = 4
    """Transformer blocks."""
    num_heads: int = 6
    """Attention heads; must divide the width."""
    normalize_target: bool = True
    """Normalize the pixels of each target patch by its own mean and variance."""
    target_ratio: float = 0.0
    """Fraction of the masked patches that training leaves out of decoding; 0 decodes them all."""

    def __post_init__(self):
        check(
            0 <= self.target_ratio < 1,
            f"pixel_decoder.target_ratio must be in [0, 1), not {self.target_ratio}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The composition; a part that no objective uses has no parameters."""

    video: VideoEncoderConfig = VideoEncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    selector: FrameSelectorConfig = FrameSelectorConfig()
    fusion: FusionConfig = FusionConfig()
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    embed_dim: int = 256
    """Width of the shared space in which videos and texts are compared."""
    answer_depth: int = 3
    """Layers of the decoder of answers."""
    num_classes: int = 0
    """Answers or labels that the classifier tells apart; 0 takes those of the data at the start."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations; parameters, losses and softmax are always float32."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Attention kernel; cudnn is the fused one, for training on GPUs in bfloat16. Masks, biases,
    temporal blocks and the frame selector go through xla all the same, and so does all that reads a
    run without a GPU."""
    remat: Remat = "none"
    """What the backward pass computes again in place of keeping it: none; selective: of every block
    all but the results of its dense layers (attention, norms, activations); full: every block. The
    frame selector's are kept."""

    def __post_init__(self):
        check_sizes("model", self, "embed_dim", "answer_depth")
        check_sizes("model.video", self.video, "depth", "mlp_dim", "patch_size")
        check_sizes("model.text", self.text, "depth", "mlp_dim", "max_len")
        check_sizes("model.pixel_decoder", self.pixel_decoder, "depth")
        for name in ("video", "text", "pixel_decoder"):
            check_attention(f"model.{name}", getattr(self, name))
        if self.attention == "cudnn":
            self._check_fused_attention()
        for name in ("video", "pixel_decoder"):
            width = getattr(self, name).width
            check(width % 4 == 0, f"model.{name}.width={width} must be a multiple of 4")
        check(0 <= self.text.dropout < 1, f"model.text.dropout={self.text.dropout} not in [0, 1)")
        sparsify, depth = self.video.sparsify, self.video.depth
        check(
            not sparsify.is_used or (sparsify.stages and sparsify.stages[-1] < depth),
            f"model.video.sparsify.stages={sparsify.stages} must name blocks of the "
            f"{depth} that model.video.depth gives",
        )
        for name in ("video", "text"):
            frozen, depth = getattr(self, name).adapter.frozen_blocks, getattr(self, name).depth
            check(
                frozen <= depth,
                f"model.{name}.adapter.frozen_blocks={frozen}, but model.{name}.depth is {depth}",
            )
        thins = sparsify.is_used and sparsify.stages[0] < self.video.adapter.frozen_blocks
        check(
            not (thins and self.video.adapter.kind == "side"),
            f"model.video.sparsify.stages={sparsify.stages} thins frozen blocks, whose side branch "
            "needs all tokens: freeze fewer blocks or use model.video.adapter.kind=inline",
        )
        for name in ("frames_per_chunk", "time_frames", "time_depth"):
            value = getattr(self.video, name)
            check(value >= 0, f"model.video.{name} must not be negative: {value}")
        self._check_layout()

    def _check_fused_attention(self) -> None:
        """cuDNN's kernel does not take everything."""
        check(
            self.dtype == "bfloat16",
            f"model.attention=cudnn needs model.dtype=bfloat16, not {self.dtype}",
        )
        parts = {name: getattr(self, name) for name in ("video", "text", "pixel_decoder")}
        for name in ("video", "text"):
            adapter = parts[name].adapter
            if adapter.frozen_blocks and adapter.kind != "none":
                parts[f"{name}.adapter"] = adapter
        for name, part in parts.items():
            head = part.width // part.num_heads
            check(
                head % 8 == 0 and head <= 128,
                "model.attention=cudnn needs heads whose width is a multiple of 8 and at most 128, "
                f"but model.{name} has {head}: change its width or num_heads",
            )

    def _check_layout(self) -> None:
        """Not everything goes with every published layout."""
        video, layout = self.video, self.video.layout
        check(
            layout.prefix == 1 or not video.sparsify.is_used,
            "model.video.sparsify thins by [CLS] and patches alone: not with "
            "model.video.layout.cls_token=False or extra_tokens",
        )
        clipwise = layout.joint or video.positions == "sincos_clip"
        check(
            not (clipwise and video.frames_per_chunk),
            "model.video.frames_per_chunk encodes frames apart: not with "
            "model.video.layout.joint or model.video.positions=sincos_clip",
        )
        check(
            not (layout.joint and layout.relative_bias != "none"),
            "model.video.layout.relative_bias is within a frame: not with layout.joint",
        )
