"""Configuration of the model: sizes and options of every part.

Field docstrings become the `--help` text.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, MultipleOf

from data_pipelines.schema.checks import check
from data_pipelines.schema.fields import Checked, Count, NonNegative, Positive, Rate, Ratio, Size
from vlmae.ops.grid import grid_cell

Remat = Literal["none", "selective", "full"]
Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]


def check_heads(width: int, num_heads: int) -> None:
    """Raise UserError unless the attention heads divide the width."""
    check(width % num_heads == 0, f"--num-heads={num_heads} does not divide --width={width}")


@dataclass(frozen=True)
class MaskConfig(Checked):
    """Visual masking: patches that the video encoder does not see during training."""

    scheme: Literal["random", "tube", "grid", "none"] = "random"
    """random: per frame; tube: one mask per clip; grid: one visible patch per cell; none."""
    # Ours: the paper's ratio could not be read.
    ratio: Ratio = 0.65
    """Fraction of the patches removed; grid needs 1 - 1/s^2 for cells of s x s patches (0.75,
    0.8889, 0.9375, ...), which may be rounded: the cell fixes the number of visible patches."""

    def check_together(self) -> None:
        """Check that the grid scheme can have this ratio."""
        if self.scheme == "grid":
            cell = grid_cell(self.ratio)
            check(
                # 1e-3, so that 0.8889 stands for 8/9
                cell > 1 and abs(self.ratio - (1 - 1 / cell**2)) < 1e-3,
                f"--ratio={self.ratio} does not fit --scheme=grid, which keeps one patch of every "
                "s x s: use 1 - 1/s^2, such as 0.75 (2 x 2), 0.8889 (3 x 3) or 0.9375 (4 x 4)",
            )


@dataclass(frozen=True)
class SparsifyConfig(Checked):
    """Fewer tokens of a frame inside the video encoder, apart from masking; off by default."""

    # Training and evaluation have a rate each: weights trained with all tokens can be pruned later,
    # and weights trained on few can be evaluated with all.
    keep_rate: Rate = 1.0
    """Fraction of the tokens that each stage keeps in training; 1 prunes nothing."""
    eval_keep_rate: Rate = 1.0
    """Fraction of the tokens that each stage keeps in evaluation."""
    # EViT's stages of a ViT with 12 blocks.
    stages: tuple[Count, ...] = (3, 6, 9)
    """Blocks, numbered from 0, that prune between attention and feed-forward network."""
    score: Literal["cls_attention", "mean_attention", "norm", "random"] = "cls_attention"
    """Measure of a token's importance; norm and random are baselines."""
    rest: Literal["fuse", "drop", "merge"] = "fuse"
    """Pruned tokens: fuse sums them, weighted by score, to one token; drop forgets them; merge
    averages each with a similar one, whatever the score (ToMe), and keeps at least half."""
    warmup_rates: tuple[Rate, ...] = ()
    """Keep rates of equal parts of the warm-up, each compiled once; empty: no warm-up."""
    warmup_steps: Count = 0
    """Length of the warm-up; after it, `keep_rate` holds."""

    def check_together(self) -> None:
        """Check that stages ascend and that a warm-up has both rates and steps."""
        check(
            # A warm-up of no steps would silently train at its last rate alone.
            bool(self.warmup_rates) == (self.warmup_steps > 0),
            f"--warmup-rates={self.warmup_rates} and --warmup-steps={self.warmup_steps} "
            "go together",
        )
        rates = (self.keep_rate, self.eval_keep_rate, *self.warmup_rates)
        check(
            self.rest != "merge" or min(rates) >= 0.5,
            f"--rest=merge joins tokens in pairs, so that a stage keeps half or more: not with "
            f"rates of {', '.join(map(str, rates))}",
        )
        check(
            # Stages are matched with the patch ids of each stage in this order.
            self.stages == tuple(sorted(set(self.stages))),
            f"--stages={self.stages} must be ascending block numbers",
        )

    @property
    def is_used(self) -> bool:
        """True if any rate prunes anything, in training or in evaluation."""
        return min(self.keep_rate, self.eval_keep_rate, *self.warmup_rates, 1.0) < 1


@dataclass(frozen=True)
class AdapterConfig(Checked):
    """Frozen shallow blocks of an encoder, and the adapters that finetune their features."""

    frozen_blocks: Count = 0
    """Number of first blocks that are not trained, with embeddings and attention biases that they
    read; 0 freezes nothing."""
    # Side: the form that saves memory, since no gradient enters a frozen block.
    kind: Literal["none", "side", "inline"] = "side"
    """side: adapters beside the frozen blocks, added after the last one, so that the backward pass
    needs none of their activations; inline: one after each frozen block; none: no adapters."""
    width: Size = 96
    """Width of the adapters' bottleneck."""
    num_heads: Size = 4
    """Attention heads of an adapter; must divide its width."""

    def check_together(self) -> None:
        """Check that the heads divide the width."""
        check_heads(self.width, self.num_heads)

    @property
    def is_used(self) -> bool:
        """True if adapters run inside of the encoder's blocks."""
        return self.frozen_blocks > 0 and self.kind != "none"


def _check_frozen(adapter: AdapterConfig, depth: int) -> None:
    check(
        adapter.frozen_blocks <= depth,
        f"--adapter.frozen-blocks={adapter.frozen_blocks}, but --depth is {depth}",
    )


@dataclass(frozen=True)
class VitLayout(Checked):
    """Differences between the published families of vision transformers; the default is MAE's.

    `vlmae weights FOLDER` prints the layout of published weights.
    """

    eps: Positive = 1e-6
    """Epsilon of the encoder's layer norms."""
    activation: Activation = "gelu"
    """Activation of the feed-forward networks; quick_gelu is x sigmoid(1.702 x) (CLIP), gelu_tanh
    GELU's tanh approximation (SigLIP)."""
    layer_scale: NonNegative = 0.0
    """Initial factor of each sublayer's output, learned by channel (DINOv2, BEiT); 0 has none."""
    input_norm: bool = False
    """Layer norm before the first block (CLIP)."""
    cls_token: bool = True
    """A [CLS] before the patches of a frame (VideoMAE has none)."""
    extra_tokens: Count = 0
    """Further learned tokens, dropped after the last block (DeiT: one, for distillation)."""
    frame_cls: Literal["token", "mean"] = "token"
    """Vector of a frame: [CLS], or the mean of its patches, normalized (BEiT, VideoMAE)."""
    relative_bias: Literal["none", "layer", "shared"] = "none"
    """Attention biases by relative position: a table for each layer, or one for all (BEiT)."""
    tubelet: Size = 1
    """Frames of a patch (VideoMAE: 2); a single image is repeated."""
    joint: bool = False
    """Attention over all frames of a clip at once (VideoMAE), not within each frame."""
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the RGB channels in [0, 1], which is subtracted; ImageNet's."""
    pixel_std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of the RGB channels, the divisor; ImageNet's."""

    def check_together(self) -> None:
        """Check that nothing needs a [CLS] that is missing."""
        # VideoMAE's is the one family without [CLS]; what else it lacks follows from that.
        bare = not self.cls_token and not self.extra_tokens
        check(
            self.cls_token or (bare and self.frame_cls == "mean" and self.relative_bias == "none"),
            "--cls-token=False goes with --frame-cls=mean, no --extra-tokens and no "
            "--relative-bias",
        )
        check(bare or not self.joint, "--joint needs --cls-token=False")
        check(
            not self.extra_tokens or self.relative_bias == "none",
            "--relative-bias knows [CLS] and patches alone: not with --extra-tokens",
        )

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches of a frame inside the encoder."""
        return int(self.cls_token) + self.extra_tokens


@dataclass(frozen=True)
class VideoEncoderConfig(Checked):
    """ViT applied to every frame alone; the default is B/16."""

    # Fixed 2-D positions split the width in four: sine and cosine, of x and of y.
    width: Annotated[int, Ge(1), MultipleOf(4)] = 768
    """Width of a token."""
    depth: Size = 12
    """Transformer blocks."""
    num_heads: Size = 12
    """Attention heads; must divide the width."""
    mlp_dim: Size = 3072
    """Hidden width of the feed-forward network."""
    patch_size: Size = 16
    """Side of a square patch in pixels."""
    positions: Literal["sincos", "learned", "sincos_clip", "none"] = "sincos"
    """sincos: fixed, 2-D, of the patches of a frame (MAE); learned: of [CLS], extra tokens and
    patches (ViT); sincos_clip: fixed, 1-D, of all patches of a clip (VideoMAE); none (BEiT)."""
    layout: VitLayout = VitLayout()
    """Differences from MAE's encoder."""
    mask: MaskConfig = MaskConfig()
    """Removal of patches, in training only."""
    sparsify: SparsifyConfig = SparsifyConfig()
    """Pruning of tokens inside some blocks."""
    adapter: AdapterConfig = AdapterConfig()
    """Frozen shallow blocks and their adapters; none by default."""
    frames_per_chunk: Count = 0
    """Frames of a clip encoded at a time; the backward pass encodes each chunk again, so that its
    memory does not grow with the activations of all frames. 0 encodes all at once."""
    time_frames: Count = 0
    """Length of the temporal embeddings, interpolated for clips of another length; 0 has none."""
    # Zeros, as in Singularity-temporal: at the start the model computes what its image weights do.
    time_init: Literal["zeros", "sincos"] = "zeros"
    """Initial temporal embeddings. zeros leave weights trained on images as they are, but a model
    trained from scratch may ignore the order of time for long."""
    time_depth: Count = 0
    """Blocks of attention across frames at each patch, after the spatial ones; 0 has none."""

    def check_together(self) -> None:
        """Check that the parts of the encoder fit each other."""
        check_heads(self.width, self.num_heads)
        sparsify, adapter, depth = self.sparsify, self.adapter, self.depth
        _check_frozen(adapter, depth)
        check(
            not sparsify.is_used or (len(sparsify.stages) > 0 and sparsify.stages[-1] < depth),
            f"--sparsify.stages={sparsify.stages} must name blocks of the {depth} that --depth "
            "gives",
        )
        # The side branch adds the corrections of all frozen blocks, so they need the same tokens.
        prunes_frozen = sparsify.is_used and sparsify.stages[0] < adapter.frozen_blocks
        check(
            not (prunes_frozen and adapter.kind == "side"),
            f"--sparsify.stages={sparsify.stages} prunes in frozen blocks, whose side branch needs "
            "all tokens: freeze fewer blocks or use --adapter.kind=inline",
        )
        self._check_layout()

    def _check_layout(self) -> None:
        layout = self.layout
        check(
            # A score compares patches with one [CLS]; an extra token would be scored like a patch.
            layout.prefix == 1 or not self.sparsify.is_used,
            "--sparsify.keep-rate prunes [CLS] and patches alone: not with "
            "--layout.cls-token=False or --layout.extra-tokens",
        )
        # Both need the whole clip at once: its attention, or the place of a frame in it.
        clipwise = layout.joint or self.positions == "sincos_clip"
        check(
            not (clipwise and self.frames_per_chunk),
            "--frames-per-chunk encodes frames apart: not with --layout.joint or "
            "--positions=sincos_clip",
        )
        check(
            not (layout.joint and layout.relative_bias != "none"),
            "--layout.relative-bias is within a frame: not with --layout.joint",
        )

    @property
    def patch_pixels(self) -> int:
        """Number of values of a patch."""
        return 3 * self.layout.tubelet * self.patch_size**2


@dataclass(frozen=True)
class TextLayout(Checked):
    """Differences between the published families of text encoders; the default is BERT's.

    `vlmae weights FOLDER` prints the layout of published weights.
    """

    eps: Positive = 1e-12
    """Epsilon of the layer norms, those of the fusion's BERT layers too."""
    activation: Activation = "gelu"
    """Activation of the feed-forward networks, those of the fusion's BERT layers too."""
    pre_norm: bool = False
    """Layer norms before each sublayer and after the last one (CLIP), not after each sum and after
    the embeddings; no token types either."""
    causal: bool = False
    """Attention to earlier tokens alone (CLIP). The end-of-text token, the only one that has read
    the whole text, then stands for [CLS]: it is moved to the front."""


@dataclass(frozen=True)
class TextEncoderConfig(Checked):
    """BERT's lower layers or CLIP's; width, heads, MLP and dropout are those of the fusion too."""

    vocab_size: Count = 0
    """Size of the WordPiece vocabulary; 0 takes size and special ids from the tokenizer."""
    # Ids of BERT's uncased vocabulary; the tokenizer of a run replaces them.
    cls_id: Count = 101
    """Token id of [CLS], or of what begins a text."""
    mask_id: Count = 103
    """Token id of [MASK]."""
    max_len: Size = 512
    """Length of the position embeddings."""
    width: Size = 768
    """Width of a token."""
    # BERT-base has 12 layers: 9 encode the text here, and the 3 of the fusion go on with the rest,
    # each with a cross-attention more (Singularity).
    depth: Size = 9
    """Transformer layers before the fusion."""
    num_heads: Size = 12
    """Attention heads; must divide the width."""
    mlp_dim: Size = 3072
    """Hidden width of the feed-forward network."""
    dropout: Ratio = 0.1
    """Dropout after embeddings, attention and feed-forward, training only."""
    pooling: Literal["cls", "mean"] = "cls"
    """Vector of a text in the shared space of VTC: its [CLS], or the mean of its tokens, as in
    sentence-transformers (MiniLM), whose [CLS] is nearly the same for all texts."""
    layout: TextLayout = TextLayout()
    """Differences from BERT's encoder."""
    adapter: AdapterConfig = AdapterConfig()
    """Frozen shallow layers and their adapters; none by default."""

    def check_together(self) -> None:
        """Check that the parts of the encoder fit each other."""
        check_heads(self.width, self.num_heads)
        _check_frozen(self.adapter, self.depth)


@dataclass(frozen=True)
class FrameSelectorConfig(Checked):
    """Text-guided selection of the frames that the fusion reads; not for images, nor for VTC."""

    kind: Literal["none", "mlp", "transformer", "uniform", "random"] = "none"
    """mlp: scores each frame from its [CLS] and that of the text; transformer: scores all frames
    together with the text; uniform, random: baselines; none keeps all frames."""
    frames: Count = 0
    """Number of selected frames; 0 selects half of them, at least one."""
    width: Size = 256
    """Width of the transformer scorer."""
    depth: Size = 2
    """Blocks of the transformer scorer."""
    num_heads: Size = 4
    """Attention heads of the transformer scorer; must divide its width."""

    def check_together(self) -> None:
        """Check that the heads divide the width."""
        check_heads(self.width, self.num_heads)

    def count(self, num_frames: int) -> int:
        """Return the number of frames kept of `num_frames`."""
        # Ours: half of the frames unless a number is given; a clip may be shorter than that number.
        return min(num_frames, self.frames or max(1, num_frames // 2))


@dataclass(frozen=True)
class SamplerConfig(Checked):
    """Samplers by which the multiway fusion condenses text and video first (MuLTI)."""

    # Numbers of latents are ours.
    video_latents: Size = 64
    """Latent tokens of a clip, whatever its length."""
    text_latents: Size = 16
    """Latent tokens of a text."""
    pooling: Literal["block", "global", "mean", "attention", "none"] = "block"
    """Pooled tokens that are added to the learned queries. block: of each block of the sequence, by
    importance; global: of all of it; mean: of each block; attention: by the queries; none."""
    guidance: Literal["context", "queries", "none"] = "context"
    """Use of the condensed text in condensing the video: read as context, a query too, or none."""
    share_attention: bool = True
    """Share one attention between text, video and fusion in each layer."""


@dataclass(frozen=True)
class FusionConfig(Checked):
    """Fusion of text and video tokens."""

    kind: Literal["cross_attention", "concat", "multiway"] = "cross_attention"
    """cross_attention: text queries attend to the video (SMAUG); concat: self-attention over both
    (ALPRO, a baseline); multiway: both condensed to latents first (MuLTI)."""
    # As many as the layers of BERT-base that the text encoder leaves.
    depth: Size = 3
    """Number of layers; with multiway, of the samplers too."""
    sampler: SamplerConfig = SamplerConfig()
    """Samplers; only used by multiway."""


@dataclass(frozen=True)
class PixelDecoderConfig(Checked):
    """Light transformer that reconstructs removed patches."""

    # MAE's decoder, 8 x 512, costs 0.30 of a dense ViT-B pass, more than the sparsified encoder
    # itself; 4 x 384 is ours.
    width: Annotated[int, Ge(1), MultipleOf(4)] = 384
    """Width of a token."""
    depth: Size = 4
    """Transformer blocks."""
    num_heads: Size = 6
    """Attention heads; must divide the width."""
    # MAE's. The target of a patch without variance is zero everywhere, so the quickstart, whose
    # shapes are flat, switches it off.
    normalize_target: bool = True
    """Normalize the pixels of each target patch by its own mean and variance."""
    target_ratio: Ratio = 0.0
    """Fraction of the removed patches that training does not decode; 0 decodes them all."""

    def check_together(self) -> None:
        """Check that the heads divide the width."""
        check_heads(self.width, self.num_heads)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The whole model; a part that no objective uses has no parameters."""

    video: VideoEncoderConfig = VideoEncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    selector: FrameSelectorConfig = FrameSelectorConfig()
    fusion: FusionConfig = FusionConfig()
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    embed_dim: Size = 256
    """Width of the shared contrastive space of videos and texts."""
    answer_depth: Size = 3
    """Layers of the answer decoder."""
    num_classes: Count = 0
    """Classes of the classifier: answers or labels; 0 takes the number from the data."""
    # float16 is not offered: it would need loss scaling, and bfloat16 has float32's range.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations; parameters, losses and softmax are always float32."""
    # Half the traffic of float32 for about 0.4 % of noise on 8 devices, 1 % on 64, 2.7 % on 512.
    gradient_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in which devices sum the gradients of kernels and word tables, if `dtype` is bfloat16:
    bfloat16 sends half the bytes of float32. On a device they are summed in float32 all the same,
    and those of biases, norms and single tokens in float32 everywhere."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention kernel; cudnn is the fused one, for GPUs in bfloat16, which keeps no attention
    weights. auto: cudnn where device, `dtype` and heads allow it, else xla. Attention with masks or
    biases, temporal blocks and the frame selector use xla all the same, and so does everything on a
    machine without a GPU."""
    remat: Remat = "none"
    """Activations that the backward pass recomputes instead of keeping. none; selective: of every
    block all but the outputs of its dense layers; full: every block. The frame selector's are
    always kept."""

    def check_together(self) -> None:
        """Check that cuDNN's attention kernel can take what it is given."""
        # Checked with the config: JAX finds it only when the step is traced on a machine with a
        # GPU.
        if self.attention == "cudnn":
            problem = self.unfit_for_cudnn()
            check(not problem, f"--attention=cudnn needs {problem}")

    def unfit_for_cudnn(self) -> str:
        """Say what cuDNN's attention kernel needs that this model has not; "" if it fits."""
        if self.dtype != "bfloat16":
            return f"--dtype=bfloat16, not {self.dtype}"
        parts: dict[str, Any] = {
            "video": self.video,
            "text": self.text,
            "pixel-decoder": self.pixel_decoder,
        }
        for name in ("video", "text"):
            if parts[name].adapter.is_used:  # they have attention of their own
                parts[f"{name}.adapter"] = parts[name].adapter
        for name, part in parts.items():
            # JAX refuses other heads too, but only once the step is traced for a GPU.
            head = part.width // part.num_heads
            if head % 8 or head > 128:
                return (
                    f"heads whose width is a multiple of 8 and at most 128, not {head}: change "
                    f"--{name}.width={part.width} or --{name}.num-heads={part.num_heads}"
                )
        return ""
