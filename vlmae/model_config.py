"""The model as data: sizes and options of every part. Field docstrings become the `--help` text."""

import math
from dataclasses import dataclass
from typing import Literal

from data_pipelines.config import check


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
    positions: Literal["sincos", "learned"] = "sincos"
    """Fixed 2-D sine-cosine positions, or learned ones."""
    mask: MaskConfig = MaskConfig()
    """Visual masking, training only."""


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


@dataclass(frozen=True)
class FusionConfig:
    """BERT layers in which text queries attend to the video tokens."""

    depth: int = 3
    """Layers of self-attention, cross-attention and feed-forward."""


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


@dataclass(frozen=True)
class ModelConfig:
    """The composition; a part that no objective uses has no parameters."""

    video: VideoEncoderConfig = VideoEncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    fusion: FusionConfig = FusionConfig()
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    embed_dim: int = 256
    """Width of the shared space in which videos and texts are compared."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations; parameters, losses and softmax are always float32."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Attention kernel; cudnn is the fused one and needs a GPU and bfloat16."""
    remat: bool = False
    """Recompute the activations of every block in the backward pass, to save memory."""

    def __post_init__(self):
        for name in ("video", "text", "pixel_decoder"):
            part = getattr(self, name)
            check(
                part.width % part.num_heads == 0,
                f"model.{name}.num_heads={part.num_heads} does not divide "
                f"model.{name}.width={part.width}",
            )
            check(part.depth >= 1, f"model.{name}.depth must be at least 1, not {part.depth}")
        for name in ("video", "pixel_decoder"):
            width = getattr(self, name).width
            check(width % 4 == 0, f"model.{name}.width={width} must be a multiple of 4")
        check(0 <= self.text.dropout < 1, f"model.text.dropout={self.text.dropout} not in [0, 1)")
