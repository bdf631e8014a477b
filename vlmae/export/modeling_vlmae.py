"""A video-language model trained by vlmae, whole, in one file that needs nothing but torch.

    model = VideoLanguageModel.from_folder("exported")
    video = model.encode_video(frames)    # uint8 [b t h w 3]
    text = model.encode_text(ids, mask)   # int64 and bool [b l]; valid tokens come first
    scores = model.match(video, text)     # [b]: how well text i fits clip i
    frames = model.prepare(clips)         # from uint8 frames of any number and size

It computes what vlmae computes in evaluation: no dropout, no noise, evaluation's keep rates; masks
may be given. A parameter is named as in vlmae, with "." between the parts of its path. The config
is a plain dict, the `config.json` beside this file. Each kind that it names (of fusion, score, ...)
is a line of a `Registry` here, and of one of the same name in vlmae.

Shapes: b rows of a batch, t frames, f = b t frames, n patches of a frame, k visible ones, m tokens,
q tokens with [CLS], l and a text tokens, s latents, d width, e shared space, c classes, v words.
"""

import ctypes
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FORMAT_VERSION = 1  # of config.json and of the names of the tensors
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TEMPERATURE_RANGE = (0.001, 0.5)
VIT_EPS, BERT_EPS = 1e-6, 1e-12
NO_PATCH = -1  # patch id of a fused token
NEVER = -1e9  # the score of an answer that was not scored


class Registry(dict):
    """A dict from the name of a kind to its implementation; a name it lacks is an error."""

    def __init__(self, what: str, kinds: dict):
        """Hold `kinds`; `what` names them in the error."""
        super().__init__(kinds)
        self.what = what

    def __missing__(self, name: str):
        """Raise ValueError, naming the known kinds."""
        raise ValueError(f"unknown {self.what} {name!r}; known are {', '.join(self)}")


# --- results


class VideoFeatures(NamedTuple):
    """Output of the video encoder."""

    tokens: Tensor  # [b t m d], patch tokens; [CLS] is not among them
    frame_cls: Tensor  # [b t d], one vector a frame, see `FRAME_VECTORS`
    stage_patch_ids: tuple[Tensor, ...]  # [b t m] of the input, then of each pruning stage
    removed_mask: Tensor  # [b t n], True where a patch was masked

    @property
    def patch_ids(self) -> Tensor:
        """The patch of each token [b t m]; NO_PATCH for a fused token."""
        return self.stage_patch_ids[-1]

    @property
    def all_tokens(self) -> Tensor:
        """The tokens of all frames in a sequence [b (t q) d], each frame after its `frame_cls`."""
        return torch.cat([self.frame_cls[:, :, None], self.tokens], dim=2).flatten(1, 2)


class TextFeatures(NamedTuple):
    """Output of the text encoder."""

    tokens: Tensor  # [b l d], [CLS] first; of a causal encoder the end-of-text token
    mask: Tensor  # [b l], True = valid; a prefix of each row

    @property
    def cls(self) -> Tensor:
        """The [CLS] token [b d]."""
        return self.tokens[:, 0]

    @property
    def mean(self) -> Tensor:
        """The mean of the valid tokens [b d], [CLS] among them."""
        valid = self.mask[..., None].to(self.tokens)
        return (self.tokens * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)

    @property
    def valid(self) -> Tensor:
        """The mask with at least one token in each row [b l]: no softmax is over nothing."""
        return prefix_mask(self.mask)


# One vector a text, for the shared contrastive space.
TEXT_POOLINGS = Registry(
    "text pooling", {"cls": lambda text: text.cls, "mean": lambda text: text.mean}
)


class FrameChoice(NamedTuple):
    """Frames of a clip that are kept for a text, with the scores of all its frames."""

    frames: Tensor  # [b K], ascending
    scores: Tensor  # [b t], zero if the kind has no scorer


class PixelPrediction(NamedTuple):
    """Predicted pixels, in the space of the reconstruction target."""

    pixels: Tensor  # [b t s p], the values of a patch ordered (y, x, rgb)
    patch_ids: Tensor  # [b t s], the patch that each prediction is for


class Attended(NamedTuple):
    """Output of attention; queries and keys serve those who score tokens by them."""

    tokens: Tensor  # [b q d]
    query: Tensor  # [b h q e]
    key: Tensor  # [b h k e]


# --- layers


class Stacks(nn.Module):
    """Module whose lists of parts are named as in vlmae: block_0, block_1, ..."""

    def add_stack(self, name: str, parts) -> None:
        """Add parts as NAME_0, NAME_1, ..."""
        for i, part in enumerate(parts):
            self.add_module(f"{name}_{i}", part)

    def stack(self, name: str) -> list:
        """Return the parts NAME_0, NAME_1, ..."""
        return [part for key, part in self.named_children() if key.rpartition("_")[0] == name]


class Attention(nn.Module):
    """Multi-head attention of tokens [b q d] to a context [b k e], or to themselves."""

    def __init__(self, width: int, num_heads: int, context_width: int = 0):
        """Make the projections; a context has the tokens' width unless it is given."""
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width or width, width)
        self.value = nn.Linear(context_width or width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Attended:
        """Attend from every token of x to the context.

        `mask` is True where a query may attend to a key [b q k], or all queries to a key [b k]; or
        it is a bias, which is added to the logits [b h q k].
        """
        query, key, value = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [b h l e]
            for y in (self.query(x), self.key(context), self.value(context))
        )
        if mask is not None and mask.ndim < 4:
            mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        read = F.scaled_dot_product_attention(query, key, value, mask)
        return Attended(self.out(read.transpose(1, 2).flatten(2)), query, key)


ACTIVATIONS = Registry(
    "activation",
    {
        "gelu": F.gelu,  # exact, as in BERT and ViT
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # SigLIP
    },
)


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu"):
        """Make width -> hidden -> width; `activation` is one of `ACTIVATIONS`."""
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map every token [... d] alone."""
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Transformer block: self-attention, cross-attention if it has a context, feed-forward.

    Pre-norm (ViT): x = x + f(LN x). Post-norm (BERT): x = LN(x + f(x)). With `layer_scale` learned
    factors of each channel scale f.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        pre_norm: bool = True,
        eps: float = VIT_EPS,
        activation: str = "gelu",
        layer_scale: bool = False,
        context_width: int = 0,
    ):
        """Make the sublayers; cross-attention only with a `context_width`."""
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = Attention(width, num_heads)
        self.attention_norm = nn.LayerNorm(width, eps)
        if context_width:
            self.cross_attention = Attention(width, num_heads, context_width)
            self.cross_attention_norm = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, activation)
        self.mlp_norm = nn.LayerNorm(width, eps)
        # None keeps the name, and leaves no entry in the state_dict.
        scale = nn.Parameter if layer_scale else lambda _: None
        self.register_parameter("attention_scale", scale(torch.ones(width)))
        self.register_parameter("mlp_scale", scale(torch.ones(width)))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Apply all sublayers to tokens [b l d]; masks as in `Attention`."""
        x = self.self_attention(x, mask).tokens
        if context is not None:
            y = self._before(x, self.cross_attention_norm)
            y = self.cross_attention(y, context, context_mask).tokens
            x = self._after(x, y, self.cross_attention_norm)
        return self.feed_forward(x)

    def self_attention(self, x: Tensor, mask: Tensor | None = None) -> Attended:
        """Apply the first sublayer, with its residual sum."""
        y = self._before(x, self.attention_norm)
        attended = self.attention(y, y, mask)
        x = self._after(x, attended.tokens, self.attention_norm, self.attention_scale)
        return attended._replace(tokens=x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply the last sublayer, with its residual sum."""
        y = self.mlp(self._before(x, self.mlp_norm))
        return self._after(x, y, self.mlp_norm, self.mlp_scale)

    def _before(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if self.pre_norm else x

    def _after(self, x: Tensor, y: Tensor, norm: nn.Module, scale: Tensor | None = None) -> Tensor:
        """Add the output y of a sublayer to its input x."""
        x = x + (y if scale is None else y * scale)
        return x if self.pre_norm else norm(x)


def bert_blocks(
    config: dict, depth: int, context_width: int = 0, pre_norm: bool = False
) -> list[Block]:
    """Make blocks of the text encoder's sizes; only its own are ever `pre_norm` (CLIP)."""
    sizes = (config["width"], config["num_heads"], config["mlp_dim"])
    options = {name: config["layout"][name] for name in ("eps", "activation")}
    options |= {"pre_norm": pre_norm, "context_width": context_width}
    return [Block(*sizes, **options) for _ in range(depth)]


def prefix_mask(mask: Tensor) -> Tensor:
    """Put as many True at the front of each row [b l] as `mask` has there, at least one."""
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.arange(mask.shape[1], device=mask.device) < lengths


def causal_mask(ids: Tensor) -> Tensor:
    """Mask [1 l l] by which each of the tokens `ids` [b l] reads itself and those before it."""
    shape = (ids.shape[1], ids.shape[1])
    return torch.ones(shape, dtype=torch.bool, device=ids.device).tril()[None]


def last_first(x: Tensor, valid: Tensor) -> Tensor:
    """Move the last valid token of each row [b l d] to its front; others move on by one."""
    place = torch.arange(x.shape[1], device=x.device)
    last = valid.sum(dim=1, keepdim=True) - 1
    return take(x, torch.where(place == 0, last, place - (place <= last).long()))


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Gather the tokens of x [... m d] at `ids` [... k]."""
    return x.gather(-2, ids[..., None].expand(*ids.shape, x.shape[-1]))


def best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores of each row [b m], ascending."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def baseline_noise(count: int) -> Tensor:
    """Draw the uniform noise in [0, 1) of vlmae's random baselines in evaluation [count].

    It is JAX's Threefry-2x32 with key 0 over a counter (Salmon et al. 2011), so that both versions
    choose alike.
    """
    # In int64 with a mask, since torch lacks most operations on uint32.
    keys, word = (0, 0, 0x1BD11BDA), 0xFFFFFFFF
    x, y = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    for i in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = (x + y) & word
            y = ((y << bits | y >> (32 - bits)) & word) ^ x
        x = (x + keys[(i + 1) % 3]) & word
        y = (y + keys[(i + 2) % 3] + i + 1) & word
    return ((x ^ y) >> 9).to(torch.float32) / 2**23  # 23 bits, the mantissa of a float32


# --- the video encoder


def random_mask(noise: Tensor, ratio: float) -> Tensor:
    """Return the ids of the visible patches [b t k]: those of the lowest noise [b t n] (MAE)."""
    # 1e-6, so that rounding never loses a patch; a stable sort, so that ties fall as in JAX.
    keep = max(1, math.floor(noise.shape[-1] * (1 - ratio) + 1e-6))
    return noise.argsort(dim=-1, stable=True)[..., :keep].sort(dim=-1).values


def sincos_positions(side: int, width: int) -> Tensor:
    """Compute fixed 2-D sine-cosine positions [side*side d]: half the channels for x, half y."""
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    # In float64 up to here, as NumPy computes the tables of vlmae.
    x, y = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([x, y], dim=1).to(torch.float32)


def sincos_clip_positions(count: int, width: int) -> Tensor:
    """Compute fixed 1-D positions [n d]: even channels sines, odd ones cosines (VideoMAE)."""
    channel = torch.arange(width)
    frequencies = 1.0 / 10000 ** ((channel - channel % 2).double() / width)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
    return torch.where(channel % 2 == 1, angles.cos(), angles.sin()).to(torch.float32)


TABLES = Registry("relative bias", {"layer": "block_{block}", "shared": "shared"})


class RelativeBias(nn.Module):
    """Attention biases by the offset of two patches: a table for each block, or for all (BEiT).

    A table holds every offset of two patches, then [CLS] to patch, patch to [CLS], [CLS] itself.
    """

    def __init__(self, kind: str, depth: int, num_heads: int, side: int):
        """Make the tables of a kind of `TABLES`, for side x side patches."""
        super().__init__()
        self.side, self.table = side, TABLES[kind]
        for name in dict.fromkeys(self.table.format(block=i) for i in range(depth)):
            table = torch.zeros((2 * side - 1) ** 2 + 3, num_heads)
            self.register_parameter(name, nn.Parameter(table))

    def forward(self, block: int, patch_ids: Tensor) -> Tensor:
        """Gather a block's bias [f h q q] between [CLS] and the patches `patch_ids` [f m].

        A fused token is no patch: its biases are zero.
        """
        table = self.get_parameter(self.table.format(block=block))
        span, last = 2 * self.side - 1, len(table) - 1
        y, x = patch_ids // self.side, patch_ids % self.side
        dy, dx = (z[:, :, None] - z[:, None, :] + self.side - 1 for z in (y, x))
        entries = F.pad(dy * span + dx, (1, 0, 1, 0), value=last)
        entries[:, 0, 1:], entries[:, 1:, 0] = last - 2, last - 1
        is_patch = F.pad(patch_ids != NO_PATCH, (1, 0), value=True)
        both = is_patch[:, :, None] & is_patch[:, None, :]
        # Fused tokens have a negative id: their entry becomes 0, and the product clears its bias.
        return (table[entries * both] * both[..., None]).permute(0, 3, 1, 2)


def attention_score(attended: Attended, bias: Tensor | None, queries: slice) -> Tensor:
    """Score tokens [f m] by the attention of some `queries`, mean over these and heads."""
    # Computed again, since fused attention returns no weights.
    query = attended.query[:, :, queries]
    logits = query @ attended.key.transpose(2, 3) / math.sqrt(query.shape[-1])
    logits = logits if bias is None else logits + bias[:, :, queries]
    return logits.softmax(dim=-1)[..., 1:].mean(dim=(1, 2))


def norm_score(attended: Attended, _: Tensor | None) -> Tensor:
    """Score tokens [f m] by the norm of their features; they sum to 1."""
    return to_sum_one(attended.tokens[:, 1:].norm(dim=-1))


def random_score(attended: Attended, _: Tensor | None) -> Tensor:
    """Score tokens [f m] by noise, equal for all frames; they sum to 1."""
    tokens = attended.tokens[:, 1:]
    return to_sum_one(baseline_noise(tokens.shape[1]).to(tokens).expand(tokens.shape[:2]))


def to_sum_one(values: Tensor) -> Tensor:
    """Scale each row of positive values to the sum 1."""
    return values / values.sum(dim=-1, keepdim=True).clamp(min=1e-6)


# (output of self-attention, its bias) -> scores of all tokens but [CLS]
SCORES = Registry(
    "score of tokens",
    {
        "cls_attention": lambda x, bias: attention_score(x, bias, slice(1)),  # [CLS] is first
        "mean_attention": lambda x, bias: attention_score(x, bias, slice(None)),
        "norm": norm_score,
        "random": random_score,
    },
)
# (tokens [f m d], their scores [f 1 m], zero for kept ones) -> tokens that stand for the pruned
RESTS = Registry(
    "rest of the tokens",
    {"fuse": lambda tokens, weights: weights @ tokens, "drop": lambda tokens, _: tokens[:, :0]},
)


def num_kept(num_tokens: int, keep_rate: float) -> int:
    """Count the tokens that a stage keeps, without a fused one: rounded up."""
    # 1e-6, since 100 * 0.55 is 55.00000000000001.
    return min(num_tokens, max(1, math.ceil(num_tokens * keep_rate - 1e-6)))


def prune(
    tokens: Tensor, patch_ids: Tensor, scores: Tensor, keep_rate: float, rest: str
) -> tuple[Tensor, Tensor]:
    """Keep [CLS] and the tokens of the highest scores, in the order they had (EViT, SMAUG).

    Takes tokens [f q d], their patch ids and scores [f m]; `rest` is one of `RESTS`. Returns tokens
    and patch ids, with a fused token last.
    """
    count = num_kept(scores.shape[1], keep_rate)
    if count == scores.shape[1]:
        return tokens, patch_ids
    kept, others = best(scores, count), tokens[:, 1:]
    fused = RESTS[rest](others, scores.scatter(1, kept, 0.0)[:, None])
    fused_ids = patch_ids.new_full((patch_ids.shape[0], fused.shape[1]), NO_PATCH)
    tokens = torch.cat([tokens[:, :1], take(others, kept), fused], dim=1)
    return tokens, torch.cat([patch_ids.gather(1, kept), fused_ids], dim=1)


def merge(
    tokens: Tensor, patch_ids: Tensor, sizes: Tensor | None, keys: Tensor, keep_rate: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Merge tokens of similar keys: bipartite soft matching (ToMe, Bolya et al. 2023).

    Takes tokens [f q d], patch ids and sizes [f m] (None: one each) and keys [f m e]. Returns
    tokens, patch ids and sizes.
    """
    m = patch_ids.shape[1]
    count = num_kept(m, keep_rate)
    if count == m:
        return tokens, patch_ids, sizes
    sizes = tokens.new_ones(patch_ids.shape) if sizes is None else sizes
    keys = F.normalize(keys.float(), dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].mT
    places = torch.arange(m, device=tokens.device).expand(patch_ids.shape)
    proposer = 2 * similarity.amax(dim=2).topk(m - count).indices
    goal = places.scatter(1, proposer, similarity.argmax(dim=2).gather(1, proposer // 2) * 2 + 1)
    kept = (goal != places).int().argsort(dim=1, stable=True)[:, :count]
    shares = torch.where(kept[:, :, None] == goal[:, None], sizes[:, None], 0.0)
    sizes = shares.sum(dim=2)
    merged = (shares / sizes[:, :, None]).to(tokens.dtype) @ tokens[:, 1:]
    return torch.cat([tokens[:, :1], merged], dim=1), patch_ids.gather(1, kept), sizes


def size_bias(sizes: Tensor) -> Tensor:
    """Return the logarithm of the keys' sizes [f 1 1 q], [CLS] of size 1 first (ToMe)."""
    return F.pad(sizes.log(), (1, 0))[:, None, None]


class Adapter(nn.Module):
    """Correction of the features of a frozen block, Up(attention(Down(LN x))) (MuLTI)."""

    def __init__(self, config: dict, width: int):
        """Make the layers for tokens of this width."""
        super().__init__()
        self.norm = nn.LayerNorm(width, VIT_EPS)
        self.down = nn.Linear(width, config["width"])
        self.attention = Attention(config["width"], config["num_heads"])
        self.up = nn.Linear(config["width"], width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the correction of x [b l d]."""
        y = self.down(self.norm(x))
        return self.up(self.attention(y, y, mask).tokens)


# (output x of a block, side branch so far, its adapter) -> (x, side branch)
ADAPTERS = Registry(
    "adapter",
    {
        "none": lambda x, branch, _: (x, branch),
        "side": lambda x, branch, adapter: (
            x,
            adapter(x) if branch is None else branch + adapter(x),
        ),
        "inline": lambda x, branch, adapter: (x + adapter(x), branch),
    },
)


class ShallowAdapters(Stacks):
    """Adapters of an encoder's first blocks: in the stream, or in a side branch added last."""

    def __init__(self, config: dict, width: int):
        """Make an adapter for each frozen block, unless the kind is "none"."""
        super().__init__()
        self.adapt, self.frozen = ADAPTERS[config["kind"]], config["frozen_blocks"]
        count = 0 if config["kind"] == "none" else self.frozen
        self.add_stack("block", (Adapter(config, width) for _ in range(count)))

    def forward(
        self, block: int, x: Tensor, branch: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return stream and side branch after the block of this number, whose output is x."""
        if block >= self.frozen:
            return x, branch
        x, branch = self.adapt(x, branch, lambda y: self.get_submodule(f"block_{block}")(y, mask))
        is_last = block == self.frozen - 1
        return (x + branch if is_last and branch is not None else x), branch


class Temporal(Stacks):
    """Temporal embeddings, then attention across frames at each patch."""

    def __init__(self, config: dict):
        """Make the table and the blocks that the video encoder's config asks for."""
        super().__init__()
        width, sizes = config["width"], (config["num_heads"], config["mlp_dim"])
        if config["time_frames"]:
            self.embedding = nn.Parameter(torch.zeros(config["time_frames"], width))
        self.add_stack("block", (Block(width, *sizes) for _ in range(config["time_depth"])))

    def forward(self, tokens: Tensor, patch_ids: Tensor) -> Tensor:
        """Add time to tokens [b t q d] and attend among those of equal patch ids [b t q]."""
        t = tokens.shape[1]
        if hasattr(self, "embedding"):
            size = (t, tokens.shape[3])
            # Antialiasing for shorter clips, as `jax.image.resize` has by default.
            table = F.interpolate(self.embedding[None, None], size, mode="bilinear", antialias=True)
            tokens = tokens + table[0, 0, :, None]
        x, patch_ids = tokens.flatten(1, 2), patch_ids.flatten(1)
        # Always by a mask: vlmae's faster way for equal ids computes the same.
        mask = patch_ids[:, :, None] == patch_ids[:, None]
        for block in self.stack("block"):
            x = block(x, mask)
        return x.unflatten(1, (t, -1))


class VideoEncoder(Stacks):
    """ViT over the visible patches of each frame, which may prune its tokens on the way.

    The config's `layout` makes it one of the published families of vision transformers.
    """

    def __init__(self, config: dict, side: int, has_time: bool):
        """Make the parts for side x side patches; the temporal part only if it `has_time`."""
        super().__init__()
        self.config, self.side = config, side
        width, layout, heads = config["width"], config["layout"], config["num_heads"]
        self.prefix = int(layout["cls_token"]) + layout["extra_tokens"]
        self.patch_embed = nn.Linear(patch_pixels(config), width)
        if layout["cls_token"]:
            self.cls = nn.Parameter(torch.zeros(width))
        if layout["extra_tokens"]:
            self.extra = nn.Parameter(torch.zeros(layout["extra_tokens"], width))
        if config["positions"] == "learned":
            self.positions = nn.Parameter(torch.zeros(self.prefix + side * side, width))
        self.input_norm = nn.Identity()
        if layout["input_norm"]:
            self.input_norm = nn.LayerNorm(width, layout["eps"])
        if layout["relative_bias"] != "none":
            sizes = (config["depth"], heads, side)
            self.relative_bias = RelativeBias(layout["relative_bias"], *sizes)
        options = {"eps": layout["eps"], "activation": layout["activation"]}
        options["layer_scale"] = layout["layer_scale"] > 0
        blocks = (Block(width, heads, config["mlp_dim"], **options) for _ in range(config["depth"]))
        self.add_stack("block", blocks)
        self.adapters = ShallowAdapters(config["adapter"], width)
        self.norm = nn.LayerNorm(width, layout["eps"])
        if has_time:
            self.temporal = Temporal(config)

    def forward(self, patches: Tensor, kept_ids: Tensor | None = None) -> VideoFeatures:
        """Encode the patches [b t n p] at `kept_ids` [b t k]; by default all."""
        b, t, n, _ = patches.shape
        if kept_ids is None:
            kept_ids = torch.arange(n, device=patches.device).expand(b, t, n)
        removed_mask = patches.new_ones(b, t, n, dtype=torch.bool).scatter(2, kept_ids, False)
        x = self._embed(take(patches, kept_ids), kept_ids)
        is_joint = self.config["layout"]["joint"]  # attention over all frames of a clip
        x, stages, sizes = self._blocks(x.flatten(1, 2) if is_joint else x.flatten(0, 1), kept_ids)
        x = x.unflatten(1, (t, -1)) if is_joint else x.unflatten(0, (b, t))
        tokens = x[:, :, self.prefix :]
        if sizes is not None:
            sizes = sizes.unflatten(0, (b, t))
        vector = FRAME_VECTORS[self.config["layout"]["frame_cls"]](x, tokens, sizes)
        x = self.norm(torch.cat([vector, tokens], dim=2))
        stages = tuple(patch_ids.unflatten(0, (b, t)) for patch_ids in stages)
        if t > 1 and (self.config["time_frames"] or self.config["time_depth"]):
            if not hasattr(self, "temporal"):
                raise ValueError("this model was trained on images alone: it encodes single frames")
            cls_ids = torch.full_like(stages[-1][:, :, :1], n)  # an id that no patch has
            x = self.temporal(x, torch.cat([cls_ids, stages[-1]], dim=2))
        return VideoFeatures(x[:, :, 1:], x[:, :, 0], stages, removed_mask)

    def _embed(self, patches: Tensor, kept_ids: Tensor) -> Tensor:
        """Embed patches with their positions [b t q d], [CLS] and extra tokens first."""
        b, t = patches.shape[:2]
        prefix_positions, table = POSITIONS[self.config["positions"]](self, t)
        x = self.patch_embed(patches) + take(table.expand(b, -1, -1, -1), kept_ids)
        if self.prefix:
            tokens = torch.cat([self.cls[None], getattr(self, "extra", self.cls[:0])])
            tokens = (tokens + prefix_positions).expand(b, t, -1, -1)
            x = torch.cat([tokens, x], dim=2)
        return self.input_norm(x)

    def _blocks(self, x: Tensor, kept_ids: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Apply all blocks; return tokens, patch ids [f m] at each stage, and the last sizes."""
        patch_ids, sparsify = kept_ids.flatten(0, 1), self.config["sparsify"]
        stages, keep_rate, sizes, branch = [patch_ids], sparsify["eval_keep_rate"], None, None
        for i, block in enumerate(self.stack("block")):
            biases = [self.relative_bias(i, patch_ids)] if hasattr(self, "relative_bias") else []
            biases += [] if sizes is None else [size_bias(sizes).to(x.dtype)]
            bias = sum(biases) if biases else None
            if keep_rate < 1 and i in sparsify["stages"]:
                attended = block.self_attention(x, bias)
                if sparsify["rest"] == "merge":
                    keys = attended.key[:, :, 1:].mean(dim=1)
                    x, patch_ids, sizes = merge(attended.tokens, patch_ids, sizes, keys, keep_rate)
                else:
                    scores = SCORES[sparsify["score"]](attended, bias)
                    x, patch_ids = prune(
                        attended.tokens, patch_ids, scores, keep_rate, sparsify["rest"]
                    )
                x = block.feed_forward(x)
                stages.append(patch_ids)
            else:
                x = block(x, bias)
            x, branch = self.adapters(i, x, branch)
        return x, stages, sizes


def mean_token(_: Tensor, tokens: Tensor, sizes: Tensor | None) -> Tensor:
    """Return the mean of the patches: that of tokens [b t m d], weighted by sizes [b t m]."""
    if sizes is None:
        return tokens.mean(dim=2, keepdim=True)
    shares = sizes / sizes.sum(dim=2, keepdim=True)
    return shares[:, :, None].to(tokens.dtype) @ tokens


# (all tokens of each frame, its patch tokens, sizes if merged) -> one vector a frame [b t 1 d]
FRAME_VECTORS = Registry("frame_cls", {"token": lambda x, _, __: x[:, :, :1], "mean": mean_token})


def sincos(encoder: VideoEncoder, times: int) -> tuple[Tensor, Tensor]:
    """Give patches fixed 2-D positions, and the prefix none (MAE)."""
    like = encoder.norm.weight
    table = sincos_positions(encoder.side, len(like)).to(like)
    return like.new_zeros(1, len(like)), table.expand(times, -1, -1)


def learned(encoder: VideoEncoder, times: int) -> tuple[Tensor, Tensor]:
    """Give each token of the prefix and each patch its learned position (ViT)."""
    table, prefix = encoder.positions, encoder.prefix
    return table[:prefix], table[prefix:].expand(times, -1, -1)


def sincos_clip(encoder: VideoEncoder, times: int) -> tuple[Tensor, Tensor]:
    """Give all patches of a clip fixed 1-D positions (VideoMAE)."""
    like = encoder.norm.weight
    table = sincos_clip_positions(times * encoder.side**2, len(like)).to(like)
    return like.new_zeros(1, len(like)), table.unflatten(0, (times, -1))


def no_positions(encoder: VideoEncoder, times: int) -> tuple[Tensor, Tensor]:
    """Give no positions; attention biases may stand in for them (BEiT)."""
    like = encoder.norm.weight
    return like.new_zeros(1, len(like)), like.new_zeros(times, encoder.side**2, len(like))


# (encoder, times) -> positions of the prefix [c d], and of the patches at each time [t n d]
POSITIONS = Registry(
    "positions",
    {
        "sincos": sincos,
        "learned": learned,
        "sincos_clip": sincos_clip,
        "none": no_positions,
    },
)


def patch_pixels(config: dict) -> int:
    """Count the values of a patch, by the config of the video encoder."""
    return 3 * config["layout"]["tubelet"] * config["patch_size"] ** 2


# --- the text encoder


class BertEmbeddings(nn.Module):
    """Word, position and token-type embeddings and a layer norm (BERT); CLIP lacks the last two."""

    def __init__(self, config: dict, pre_norm: bool = False):
        """Make the tables of the text encoder's sizes; `pre_norm`: CLIP's."""
        super().__init__()
        width, self.pre_norm = config["width"], pre_norm
        self.word = nn.Embedding(config["vocab_size"], width)
        self.position = nn.Embedding(config["max_len"], width)
        if not pre_norm:
            self.token_type = nn.Embedding(2, width)
            self.norm = nn.LayerNorm(width, config["layout"]["eps"])

    def forward(self, ids: Tensor) -> Tensor:
        """Embed token ids [b l] as tokens [b l d]."""
        x = self.word(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return x if self.pre_norm else self.norm(x + self.token_type(torch.zeros_like(ids)))

    def scores(self, x: Tensor) -> Tensor:
        """Multiply tokens by the word table: logits [b l v] with tied weights."""
        return x @ self.word.weight.T


class TextEncoder(Stacks):
    """Text encoder: the lower layers of a BERT, or CLIP's text tower."""

    def __init__(self, config: dict):
        """Make embeddings, blocks and adapters."""
        super().__init__()
        self.layout, pre_norm = config["layout"], config["layout"]["pre_norm"]
        self.embeddings = BertEmbeddings(config, pre_norm)
        self.add_stack("block", bert_blocks(config, config["depth"], pre_norm=pre_norm))
        self.norm = nn.LayerNorm(config["width"], self.layout["eps"]) if pre_norm else nn.Identity()
        self.adapters = ShallowAdapters(config["adapter"], config["width"])

    def forward(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Encode token ids [b l]; `mask` is True on valid tokens, which come first in a row."""
        x, valid, branch = self.embeddings(ids), prefix_mask(mask), None
        read = valid
        if self.layout["causal"]:
            read = valid[:, None] & causal_mask(ids)
        for i, block in enumerate(self.stack("block")):
            x, branch = self.adapters(i, block(x, read), branch, valid)
        x = self.norm(x)
        return TextFeatures(last_first(x, valid) if self.layout["causal"] else x, mask)


# --- the frame selector


class FrameScorer(Stacks):
    """Keeps the frames of the highest scores for a text (SMAUG); a subclass scores them."""

    def __init__(self, config: dict, text_width: int, video_width: int):
        """Make the norms of the inputs."""
        super().__init__()
        self.config = config
        self.frame_norm = nn.LayerNorm(video_width, VIT_EPS)
        self.text_norm = nn.LayerNorm(text_width, VIT_EPS)

    def forward(self, text: TextFeatures, video: VideoFeatures) -> FrameChoice:
        """Choose the frames of clip i for text i."""
        scores = self.score_frames(self.text_norm(text.cls), self.frame_norm(video.frame_cls))
        return FrameChoice(best(scores, num_selected(self.config, scores.shape[1])), scores)


class MlpScorer(FrameScorer):
    """Scores each frame alone by an MLP on [frame [CLS]; text [CLS]]."""

    def __init__(self, config: dict, text_width: int, video_width: int):
        """Make the MLP."""
        super().__init__(config, text_width, video_width)
        self.hidden = nn.Linear(video_width + text_width, video_width)
        self.score = nn.Linear(video_width, 1)

    def score_frames(self, text: Tensor, frames: Tensor) -> Tensor:
        """Score frames [b t] of normalized vectors [b d] and [b t d]."""
        pairs = torch.cat([frames, text[:, None].expand(-1, frames.shape[1], -1)], dim=2)
        return self.score(F.gelu(self.hidden(pairs)))[..., 0]


class TransformerScorer(FrameScorer):
    """Scores all frames together by blocks over [text [CLS]; frame [CLS]s]."""

    def __init__(self, config: dict, text_width: int, video_width: int):
        """Make the blocks and the projections to their width."""
        super().__init__(config, text_width, video_width)
        width, heads = config["width"], config["num_heads"]
        self.frame_embed = nn.Linear(video_width, width)
        self.text_embed = nn.Linear(text_width, width)
        self.add_stack("block", (Block(width, heads, 4 * width) for _ in range(config["depth"])))
        self.norm = nn.LayerNorm(width, VIT_EPS)
        self.score = nn.Linear(width, 1)

    def score_frames(self, text: Tensor, frames: Tensor) -> Tensor:
        """Score frames [b t] of normalized vectors [b d] and [b t d]."""
        x = torch.cat([self.text_embed(text)[:, None], self.frame_embed(frames)], dim=1)
        for block in self.stack("block"):
            x = block(x)
        return self.score(self.norm(x[:, 1:]))[..., 0]


class UniformFrames(nn.Module):
    """Keeps the middle frames of equal segments, a baseline."""

    def __init__(self, config: dict, *_: int):
        """Make no parameters."""
        super().__init__()
        self.config = config

    def forward(self, _: TextFeatures, video: VideoFeatures) -> FrameChoice:
        """Choose the same frames of every clip."""
        zeros = torch.zeros_like(video.frame_cls[..., 0])
        # Zeros stand for scores, as no scorer is asked.
        frames = self.frames(zeros.shape[1]).to(zeros.device)
        return FrameChoice(frames.expand(zeros.shape[0], -1), zeros)

    def frames(self, t: int) -> Tensor:
        """Return the chosen frames of t."""
        count = num_selected(self.config, t)
        return torch.tensor([(2 * i + 1) * t // (2 * count) for i in range(count)])


class RandomFrames(UniformFrames):
    """Keeps one set of random frames for all clips, a baseline."""

    def frames(self, t: int) -> Tensor:
        """Return the chosen frames of t."""
        return best(baseline_noise(t), num_selected(self.config, t))


def num_selected(config: dict, num_frames: int) -> int:
    """Count the frames that a selector keeps."""
    return min(num_frames, config["frames"] or max(1, num_frames // 2))


SELECTORS = Registry(
    "frame selector",
    {
        "mlp": MlpScorer,
        "transformer": TransformerScorer,
        "uniform": UniformFrames,
        "random": RandomFrames,
    },
)


def keep_frames(video: VideoFeatures, frames: Tensor) -> VideoFeatures:
    """Gather the features of the chosen frames [b K]."""
    # shape[0], not len(), here and below: a traced model keeps its batch symbolic.
    rows = torch.arange(frames.shape[0], device=frames.device)[:, None]
    tokens, frame_cls, stages, removed_mask = video
    kept_stages = tuple(patch_ids[rows, frames] for patch_ids in stages)
    return VideoFeatures(
        tokens[rows, frames], frame_cls[rows, frames], kept_stages, removed_mask[rows, frames]
    )


# --- fusions of text and video: a class (config, text config, video width) and a line in FUSIONS


class CrossAttentionFusion(Stacks):
    """Blocks of text self-attention, cross-attention to all video tokens, feed-forward (SMAUG)."""

    condenses_text = False  # the output keeps the text's tokens, and its padding

    def __init__(self, config: dict, text: dict, video_width: int):
        """Make the blocks."""
        super().__init__()
        self.add_stack("block", bert_blocks(text, config["depth"], video_width))

    def forward(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """Return the text tokens [b l d] after they have read the tokens of all frames."""
        x, context = text.tokens, video.tokens.flatten(1, 2)
        for block in self.stack("block"):
            x = block(x, text.valid, context)
        return x


class ConcatFusion(Stacks):
    """Blocks of self-attention over all tokens of video and text together (as in ALPRO)."""

    condenses_text = False

    def __init__(self, config: dict, text: dict, video_width: int):
        """Make the blocks, and a projection of the video if its width differs."""
        super().__init__()
        self.video_embed = to_width(video_width, text["width"])
        self.add_stack("block", bert_blocks(text, config["depth"]))

    def forward(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """Return the text tokens [b l d] after they have read the tokens of all frames."""
        clip = self.video_embed(video.all_tokens)
        x = torch.cat([clip, text.tokens], dim=1)
        # Clips have no padding: all their tokens are valid.
        all_valid = torch.ones(clip.shape[:2], dtype=torch.bool, device=x.device)
        for block in self.stack("block"):
            x = block(x, torch.cat([all_valid, text.valid], dim=1))
        return x[:, clip.shape[1] :]


def to_width(width: int, wanted: int) -> nn.Module:
    """Make a linear map between widths, or the identity between equal ones."""
    return nn.Identity() if width == wanted else nn.Linear(width, wanted)


class MeanPooling(nn.Module):
    """Averages contiguous blocks of a source to one token a latent (MuLTI, adapt-pooling)."""

    def __init__(self, *_: int):
        """Make no parameters."""
        super().__init__()

    def forward(self, queries: Tensor, source: Tensor, valid: Tensor) -> Tensor:
        """Pool the source [b m d] where it is `valid` [b m] to a token for each query [b s d]."""
        members = self.members(valid, queries.shape[1])
        return self.scores(source).masked_fill(~members, -math.inf).softmax(dim=-1) @ source

    def scores(self, source: Tensor) -> Tensor:
        """Score tokens, by which a softmax over the members of a pool weights them."""
        return source.new_zeros(1, 1, source.shape[1])

    def members(self, valid: Tensor, count: int) -> Tensor:
        """Assign tokens to `count` pools [b s m]: contiguous blocks of nearly equal size.

        Block i of n valid tokens begins at floor(i n / s) and ends before ceil((i + 1) n / s).
        """
        lengths, block = valid.sum(dim=1, keepdim=True), torch.arange(count, device=valid.device)
        start, end = block * lengths // count, -(-(block + 1) * lengths // count)
        token = torch.arange(valid.shape[1], device=valid.device)
        return (start[..., None] <= token) & (token < end[..., None])


class BlockPooling(MeanPooling):
    """Averages contiguous blocks, weighted by learned importance."""

    def __init__(self, width: int, _: int, num_scores: int = 1):
        """Make the layers that score a token, once or several times."""
        super().__init__()
        self.source_norm = nn.LayerNorm(width, VIT_EPS)
        self.importance = nn.Linear(width, num_scores)

    def scores(self, source: Tensor) -> Tensor:
        """Score tokens by their importance."""
        return self.importance(self.source_norm(source)).transpose(1, 2)


class GlobalPooling(BlockPooling):
    """Averages all tokens once a latent, weighted by importances of its own."""

    def __init__(self, width: int, num_heads: int, num_latents: int):
        """Make the layers that score a token for each latent."""
        super().__init__(width, num_heads, num_latents)

    def members(self, valid: Tensor, _: int) -> Tensor:
        """Put all valid tokens into each pool."""
        return valid[:, None]


class AttentionPooling(nn.Module):
    """Lets the queries attend to the source (MuLTI, v1)."""

    def __init__(self, width: int, num_heads: int, _: int):
        """Make attention and norms."""
        super().__init__()
        self.source_norm, self.norm = nn.LayerNorm(width, VIT_EPS), nn.LayerNorm(width, VIT_EPS)
        self.attention = Attention(width, num_heads)

    def forward(self, queries: Tensor, source: Tensor, valid: Tensor) -> Tensor:
        """Pool as `MeanPooling` does."""
        return self.attention(self.norm(queries), self.source_norm(source), valid).tokens


POOLINGS = Registry(
    "pooling of the sampler",
    {
        "block": lambda width, heads, _: BlockPooling(width, heads),
        "global": GlobalPooling,
        "mean": MeanPooling,
        "attention": AttentionPooling,
    },
)


class LatentLayer(nn.Module):
    """Latents read themselves and a source by an attention that ways may share; feed-forward."""

    def __init__(self, width: int, hidden: int, has_source: bool):
        """Make all layers but the attention."""
        super().__init__()
        self.norm = nn.LayerNorm(width, VIT_EPS)
        if has_source:
            self.source_norm = nn.LayerNorm(width, VIT_EPS)
        self.mlp = Mlp(width, hidden)
        self.mlp_norm = nn.LayerNorm(width, VIT_EPS)

    def forward(
        self,
        z: Tensor,
        attention: Attention,
        source: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the latents [b s d] after reading a source [b m d] where it is `valid` [b m]."""
        query = context = self.norm(z)
        if source is not None:
            context = torch.cat([query, self.source_norm(source)], dim=1)
            valid = torch.cat([valid.new_ones(z.shape[:2]), valid], dim=1)
        z = z + attention(query, context, valid).tokens
        return z + self.mlp(self.mlp_norm(z))


# (latents, guide) -> (queries of the layers, guide among keys and values or None)
GUIDANCES = Registry(
    "guidance",
    {
        "context": lambda z, guide: (z, guide),
        "queries": lambda z, guide: (torch.cat([z, guide], dim=1), None),
        "none": lambda z, _: (z, None),
    },
)


class Sampler(nn.Module):
    """Condenses a sequence of any length to a fixed number of latents."""

    def __init__(self, num_latents: int, pooling: str, width: int, num_heads: int):
        """Make latents and pooling; the layers are those of the fusion."""
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(num_latents, width))
        if pooling != "none":
            self.pooling = POOLINGS[pooling](width, num_heads, num_latents)
        self.norm = nn.LayerNorm(width, VIT_EPS)

    def forward(
        self,
        source: Tensor,
        valid: Tensor,
        layers: list,
        guide: Tensor | None = None,
        guidance: str = "none",
    ) -> Tensor:
        """Return the latents [b s d] of a source [b m d], by (layer, attention) pairs.

        Latents of the other modality may guide them; `guidance` is one of `GUIDANCES`.
        """
        z = self.latents.expand(source.shape[0], -1, -1)
        if hasattr(self, "pooling"):
            z = z + self.pooling(z, source, valid)
        z, context = GUIDANCES[guidance](z, guide)
        if context is not None:
            source = torch.cat([context, source], dim=1)
            valid = torch.cat([valid.new_ones(context.shape[:2]), valid], dim=1)
        for layer, attention in layers:
            z = layer(z, attention, source, valid)
        return self.norm(z[:, : len(self.latents)])


class MultiWayFusion(Stacks):
    """Condenses text and video to latents and fuses them by shared attention (MuLTI)."""

    condenses_text = True  # the output holds latents, all valid

    def __init__(self, config: dict, text: dict, video_width: int):
        """Make the attentions, the layers of each way around them, and the samplers."""
        super().__init__()
        sampler, width, heads = config["sampler"], text["width"], text["num_heads"]
        self.is_shared, self.guidance = sampler["share_attention"], sampler["guidance"]
        for way in ("shared",) if self.is_shared else ("text", "video", "fused"):
            attentions = (Attention(width, heads) for _ in range(config["depth"]))
            self.add_stack(f"{way}_attention", attentions)
        for way in ("text", "video", "fused"):
            layer = (width, text["mlp_dim"], way != "fused")
            self.add_stack(f"{way}_layers", (LatentLayer(*layer) for _ in range(config["depth"])))
        pooling = (sampler["pooling"], width, heads)
        self.text_sampler = Sampler(sampler["text_latents"], *pooling)
        self.video_sampler = Sampler(sampler["video_latents"], *pooling)
        self.norm = nn.LayerNorm(width, VIT_EPS)
        self.video_embed = to_width(video_width, width)

    def forward(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """Return the fused [CLS] of the text, text latents and video latents [b q d]."""
        clip = self.video_embed(video.all_tokens)
        texts = self.text_sampler(text.tokens, text.valid, self._way("text"))
        all_valid = torch.ones(clip.shape[:2], dtype=torch.bool, device=clip.device)
        frames = self.video_sampler(clip, all_valid, self._way("video"), texts, self.guidance)
        z = torch.cat([text.cls[:, None], texts, frames], dim=1)
        for layer, attention in self._way("fused"):
            z = layer(z, attention)
        return self.norm(z)

    def _way(self, name: str) -> list:
        attention = self.stack("shared_attention" if self.is_shared else f"{name}_attention")
        return list(zip(self.stack(f"{name}_layers"), attention, strict=True))


class WordReader(nn.Module):
    """Reads each token of a text back from the fused latents."""

    def __init__(self, text: dict):
        """Make attention and feed-forward network of the text encoder's sizes."""
        super().__init__()
        width = text["width"]
        self.attention = Attention(width, text["num_heads"])
        self.norm, self.mlp_norm = nn.LayerNorm(width, VIT_EPS), nn.LayerNorm(width, VIT_EPS)
        self.mlp = Mlp(width, text["mlp_dim"])

    def forward(self, text: TextFeatures, fused: Tensor) -> Tensor:
        """Return the text tokens [b l d] after they have read the fused ones [b q d]."""
        x = text.tokens + self.attention(self.norm(text.tokens), fused).tokens
        return x + self.mlp(self.mlp_norm(x))


FUSIONS = Registry(
    "fusion",
    {
        "cross_attention": CrossAttentionFusion,
        "concat": ConcatFusion,
        "multiway": MultiWayFusion,
    },
)


# --- heads and decoders


class Projection(nn.Module):
    """Linear map into the shared contrastive space, then unit length."""

    def __init__(self, width: int, embed_dim: int):
        """Make the map width -> embed_dim."""
        super().__init__()
        self.dense = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Project features [... d] to unit vectors [... e]."""
        y = self.dense(x)
        return y / y.norm(dim=-1, keepdim=True).clamp(min=1e-6)


class WordTransform(nn.Module):
    """BERT's transform before the token logits: linear, exact GELU, layer norm."""

    def __init__(self, width: int):
        """Make the layers for tokens of this width."""
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, BERT_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token [... d] alone."""
        return self.norm(F.gelu(self.dense(x)))


class Classifier(nn.Module):
    """Two linear maps with an exact GELU between: d -> 2d -> classes (MuLTI)."""

    def __init__(self, width: int, num_classes: int):
        """Make the maps."""
        super().__init__()
        self.hidden, self.classes = nn.Linear(width, 2 * width), nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [b c] of features [b d]."""
        return self.classes(F.gelu(self.hidden(x)))


class AnswerDecoder(Stacks):
    """BERT decoder of answers, with cross-attention to the fused question and clip (SMAUG)."""

    def __init__(self, text: dict, depth: int):
        """Make the decoder of the text encoder's sizes."""
        super().__init__()
        self.embeddings = BertEmbeddings(text)
        self.add_stack("block", bert_blocks(text, depth, text["width"]))
        self.word_transform = WordTransform(text["width"])
        self.word_bias = nn.Parameter(torch.zeros(text["vocab_size"]))

    def forward(self, ids: Tensor, fused: Tensor, valid: Tensor | None) -> Tensor:
        """Compute logits [b a v] of the token after each of `ids`, by `fused` where `valid`."""
        x, causal = self.embeddings(ids), causal_mask(ids)
        for block in self.stack("block"):
            x = block(x, causal, fused, valid)
        return self.embeddings.scores(self.word_transform(x)) + self.word_bias


class PixelDecoder(Stacks):
    """Light transformer that reconstructs removed patches, frame by frame (MAE)."""

    def __init__(self, config: dict, side: int, video_width: int, patch_pixels: int):
        """Make the decoder of side x side patches of `patch_pixels` values."""
        super().__init__()
        self.side, width = side, config["width"]
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.embed = nn.Linear(video_width, width)
        blocks = (Block(width, config["num_heads"], 4 * width) for _ in range(config["depth"]))
        self.add_stack("block", blocks)
        self.norm = nn.LayerNorm(width, VIT_EPS)
        self.pixels = nn.Linear(width, patch_pixels)

    def forward(self, video: VideoFeatures, patch_ids: Tensor | None = None) -> PixelPrediction:
        """Predict the pixels of every patch of every frame, or of `patch_ids` [b t s]."""
        b, t, n = video.removed_mask.shape
        cls, tokens = self.embed(video.frame_cls)[:, :, None], self.embed(video.tokens)
        x = tokens.new_zeros(b, t, n + 1, tokens.shape[3]) + self.mask_token
        # Slot n takes the fused tokens, which have no patch, and is cut off.
        slots = torch.where(video.patch_ids == NO_PATCH, n, video.patch_ids)
        x = x.scatter(2, slots[..., None].expand_as(tokens), tokens)[:, :, :n]
        x = x + sincos_positions(self.side, x.shape[3]).to(x)
        if patch_ids is None:
            patch_ids = torch.arange(n, device=x.device).expand(b, t, n)
        else:
            x = take(x, patch_ids)
        x = torch.cat([cls, x], dim=2).flatten(0, 1)
        for block in self.stack("block"):
            x = block(x)
        return PixelPrediction(self.pixels(self.norm(x[:, 1:])).unflatten(0, (b, t)), patch_ids)


# --- pictures


def normalize(video: Tensor, layout: dict) -> Tensor:
    """Turn uint8 frames [... h w 3] into the floats that the encoder was trained on."""
    mean, std = (torch.tensor(layout[x]).to(video.device) for x in ("pixel_mean", "pixel_std"))
    return (video.float() / 255 - mean) / std


def clip_view(frames: Tensor, num_frames: int, size: int) -> Tensor:
    """Choose the middles of equal parts of a clip, and of each its center square, uint8.

    Args:
      frames: uint8 [t h w 3], at equal distances in time; a single one is a picture and stays so.
      num_frames: of the result; some repeat if the clip has fewer.
      size: height and width of the result. Resized bicubically with antialiasing, by Pillow.

    Raises:
      ValueError: the frames are of another type or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        found = f"{frames.dtype} {list(frames.shape)}"
        raise ValueError(f"a clip must be uint8 frames [t h w 3], not {found}")
    count = num_frames if len(frames) > 1 else 1
    chosen = [frames[(2 * i + 1) * len(frames) // (2 * count)] for i in range(count)]
    return torch.stack([center_square(frame, size) for frame in chosen])


def center_square(frame: Tensor, size: int) -> Tensor:
    """Resize the largest square in the middle of a frame [h w 3]; as it is if nothing changes."""
    from PIL import Image

    height, width, _ = frame.shape
    if (height, width) == (size, size):
        return frame
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    frame = frame.cpu().contiguous()
    # Not bytes(frame), which makes a tensor of each value: seconds for a frame.
    pixels = ctypes.string_at(frame.data_ptr(), frame.numel())
    image = Image.frombytes("RGB", (width, height), pixels)
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)


# --- the model


class VideoLanguageModel(nn.Module):
    """Video-language model of SMAUG and MuLTI, with the parts that its checkpoint holds.

    A method that needs another part raises ValueError and names it.
    """

    def __init__(self, config: dict):
        """Build the model of a `config.json`; its parameters are to be loaded.

        Raises:
          ValueError: the config is of another format version, or names an unknown part or kind.
        """
        super().__init__()
        self.build(config)

    @classmethod
    def from_folder(cls, folder: str | Path, check_files: bool = True) -> "VideoLanguageModel":
        """Load the model of an exported folder, ready for evaluation.

        Args:
          folder: as `vlmae export` wrote it.
          check_files: compare both files with `SHA256SUMS`; False saves a pass over huge ones.

        Raises:
          FileNotFoundError: there is no config.json or no model.safetensors.
          ValueError: a file is damaged, of another version, a pickle, or does not fit the other.
        """
        folder = Path(folder)
        config = read_config(folder)
        if check_files:
            check_sums(folder)
        tensors = read_tensors(folder)
        try:
            with torch.device("meta"):  # no memory for parameters that the file's replace at once
                model = cls(config)
        except Exception as error:  # a config that was edited, or is damaged, leads to any
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"{folder / 'config.json'}: no such model: {reason}") from error
        check_tensors(tensors, model.state_dict(), folder / "model.safetensors")
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def build(self, config: dict) -> None:
        """Make the parts; apart from `__init__`, for a subclass with another base's `__init__`."""
        check_version(config, "the config")
        model, self.image_size = config["model"], config["image_size"]
        self.num_frames = config.get("num_frames", 1)
        self.model_config, self.parts = model, tuple(config["parts"])
        video, text = model["video"], model["text"]
        side, width = self.image_size // video["patch_size"], text["width"]
        # Functions, so that a part that the checkpoint lacks is never made.
        makers = {
            "video_encoder": lambda: VideoEncoder(
                video, side, "video_encoder.temporal" in self.parts
            ),
            "text_encoder": lambda: TextEncoder(text),
            "frame_selector": lambda: SELECTORS[model["selector"]["kind"]](
                model["selector"], width, video["width"]
            ),
            "fusion": lambda: FUSIONS[model["fusion"]["kind"]](
                model["fusion"], text, video["width"]
            ),
            "word_reader": lambda: WordReader(text),
            "pixel_decoder": lambda: PixelDecoder(
                model["pixel_decoder"], side, video["width"], patch_pixels(video)
            ),
            "video_projection": lambda: Projection(video["width"], model["embed_dim"]),
            "text_projection": lambda: Projection(width, model["embed_dim"]),
            "temperature": lambda: nn.Parameter(torch.zeros(())),
            "logit_bias": lambda: nn.Parameter(torch.zeros(())),
            "match_head": lambda: nn.Linear(width, 2),
            "choice_head": lambda: nn.Linear(width, config["num_options"]),
            "word_transform": lambda: WordTransform(width),
            "word_bias": lambda: nn.Parameter(torch.zeros(text["vocab_size"])),
            "classifier": lambda: Classifier(width, model["num_classes"]),
            "answer_decoder": lambda: AnswerDecoder(text, model["answer_depth"]),
        }
        unknown = sorted(set(self.parts) - {*makers, "video_encoder.temporal"})
        if unknown:
            raise ValueError(f"the config names unknown parts: {', '.join(unknown)}")
        for name, make in makers.items():
            if name in self.parts:
                setattr(self, name, make())

    def forward(self, video: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Score how well text i fits clip i [b]: `match` of the encoded inputs."""
        return self.match(self.encode_video(video), self.encode_text(ids, mask))

    def prepare(self, clips) -> Tensor:
        """Choose, resize and crop frames as vlmae's evaluation does; uint8 [b t h w 3].

        Args:
          clips: a list of clips, each uint8 frames [t h w 3] of any number and size, a tensor or a
            NumPy array. Equal distances in time between frames are assumed.

        Raises:
          ValueError: a clip is of another type or shape.
        """
        views = [clip_view(torch.as_tensor(x), self.num_frames, self.image_size) for x in clips]
        return torch.stack(views).to(next(self.parameters()).device)

    def get_video_features(self, pixel_values: Tensor) -> Tensor:
        """Embed clips [b e]: the mean of their frames' unit vectors, which texts are compared with.

        Args:
          pixel_values: uint8 [b t h w 3] as `prepare` returns, or normalized [b t 3 h w].
        """
        return self.embed_video(self.encode_video(pixel_values)).mean(dim=1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed texts [b e] as unit vectors; arguments as in `encode_text`."""
        return self.embed_text(self.encode_text(input_ids, attention_mask))

    def patches(self, video: Tensor) -> Tensor:
        """Cut uint8 frames [b f h w 3] into patches [b t n p] of normalized pixels.

        Frames of floats are taken as normalized, in the order [b f 3 h w] of transformers.
        A patch is ordered (frame, y, x, rgb); it covers one frame or, in a tubelet, several. A
        single image is repeated to a tubelet.

        Raises:
          ValueError: the frames are of another size, or do not divide into tubelets.
        """
        side, is_normalized = self.image_size, video.is_floating_point()
        shape = (3, side, side) if is_normalized else (side, side, 3)
        if video.ndim != 5 or video.shape[2:] != shape:
            size = " ".join(map(str, shape))
            raise ValueError(f"{video.dtype} frames must be [b f {size}], not {list(video.shape)}")
        config, layout = self.model_config["video"], self.model_config["video"]["layout"]
        x = video.movedim(2, -1) if is_normalized else normalize(video, layout)
        p, tubelet = config["patch_size"], layout["tubelet"]
        if x.shape[1] == 1:
            x = x.expand(-1, tubelet, -1, -1, -1)
        if x.shape[1] % tubelet:
            raise ValueError(f"clips of {x.shape[1]} frames do not divide into {tubelet}s")
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).unflatten(1, (-1, tubelet))
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)  # b t y x f p q c
        return x.flatten(4).flatten(2, 3).to(next(self.parameters()).dtype)

    def encode_video(self, video: Tensor, kept_ids: Tensor | None = None) -> VideoFeatures:
        """Encode uint8 frames [b t h w 3]: of each the patches `kept_ids` [b t k], or all."""
        return self._part("video_encoder")(self.patches(video), kept_ids)

    def encode_text(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Encode token ids [b l]; `mask` is True on valid tokens, which come first."""
        return self._part("text_encoder")(ids, mask.bool())

    def embed_video(self, video: VideoFeatures) -> Tensor:
        """Project frames to unit vectors [b t e]; a clip is compared by their mean."""
        return self._part("video_projection")(video.frame_cls)

    def embed_text(self, text: TextFeatures) -> Tensor:
        """Project texts to unit vectors [b e]."""
        pooled = TEXT_POOLINGS[self.model_config["text"]["pooling"]](text)
        return self._part("text_projection")(pooled)

    def similarity(self, video: VideoFeatures, text: TextFeatures) -> Tensor:
        """Compare each clip with each text [b c]: the mean over frames of their cosines."""
        return self.embed_video(video).mean(dim=1) @ self.embed_text(text).T

    def logits(self, video: VideoFeatures, text: TextFeatures) -> Tensor:
        """Scale similarities [b c] for the softmax or sigmoid of VTC, see `scale_similarity`."""
        return self.scale_similarity(self.similarity(video, text))

    def scale_similarity(self, similarity: Tensor) -> Tensor:
        """Divide similarities by the learned temperature; of a sigmoid loss, add its bias."""
        logits = similarity / self.temperature_value()
        return logits + self.logit_bias if "logit_bias" in self.parts else logits

    def temperature_value(self) -> Tensor:
        """Return the learned temperature, within its range."""
        return self._part("temperature").clamp(*TEMPERATURE_RANGE)

    def choose_frames(self, video: VideoFeatures, text: TextFeatures) -> FrameChoice | None:
        """Select the frames of clip i that are fused with text i; None if all are."""
        if self.model_config["selector"]["kind"] == "none" or video.tokens.shape[1] == 1:
            return None
        return self._part("frame_selector")(text, video)

    def fuse(self, video: VideoFeatures, text: TextFeatures) -> Tensor:
        """Fuse text i with the selected frames of clip i [b q d], the text's [CLS] first."""
        choice = self.choose_frames(video, text)
        return self._part("fusion")(
            text, video if choice is None else keep_frames(video, choice[0])
        )

    def match(self, video: VideoFeatures, text: TextFeatures) -> Tensor:
        """Score how well text i fits clip i [b]: logit of a match minus logit of none."""
        logits = self._part("match_head")(self.fuse(video, text)[:, 0])
        return logits[:, 1] - logits[:, 0]

    def choose(self, video: VideoFeatures, text: TextFeatures) -> Tensor:
        """Compute logits [b c] of the options that text i lists, or the score [b 1] of one."""
        return self._part("choice_head")(self.fuse(video, text)[:, 0])

    def word_logits(self, video: VideoFeatures, text: TextFeatures) -> Tensor:
        """Compute logits [b l v] of every vocabulary entry for each token of the text."""
        x = self.fuse(video, text)
        if self._condenses_text():
            x = self._part("word_reader")(text, x)
        scores = self.text_encoder.embeddings.scores(self._part("word_transform")(x))
        return scores + self.word_bias

    def decode_pixels(self, video: VideoFeatures) -> PixelPrediction:
        """Predict the pixels of every patch."""
        return self._part("pixel_decoder")(video)

    def answer(
        self,
        video: VideoFeatures,
        text: TextFeatures,
        answers: tuple[Tensor, Tensor] | None = None,
        top_k: int = 128,
    ) -> Tensor:
        """Score the answers to question i about clip i, or the labels of the clip [b c].

        Without `answers` these are logits of the classifier. With ids and mask [c a] of answers
        ([CLS] ... [SEP]) they are log-probabilities by the decoder; only answers of the `top_k`
        likeliest first tokens are scored whole, the others get NEVER.
        """
        fused = self.fuse(video, text)
        if answers is None:
            return self._part("classifier")(fused[:, 0])
        (ids, mask), b = answers, fused.shape[0]
        k = min(top_k, len(ids))
        first = self._decode(ids[:1, :1].expand(b, 1), text, fused)[:, 0]
        # Column 1 is the first word: column 0 is [CLS], which starts the decoder.
        chosen = first[:, ids[:, 1]].topk(k, dim=1).indices
        log_p = self.answer_log_probs(
            ids[chosen.flatten()],
            mask[chosen.flatten()],
            TextFeatures(*(x.repeat_interleave(k, dim=0) for x in text)),
            fused.repeat_interleave(k, dim=0),
        )
        scores = fused.new_full((b, len(ids)), NEVER)
        return scores.scatter(1, chosen, log_p.unflatten(0, (b, k)))

    def answer_log_probs(
        self, ids: Tensor, mask: Tensor, text: TextFeatures, fused: Tensor
    ) -> Tensor:
        """Compute the log-probability [b] of each whole answer [b a] to a fused question."""
        log_p = self._decode(ids[:, :-1], text, fused).log_softmax(dim=-1)
        log_p = log_p.gather(2, ids[:, 1:, None])[..., 0]
        return log_p.masked_fill(~mask[:, 1:].bool(), 0.0).sum(dim=1)

    def _decode(self, ids: Tensor, text: TextFeatures, fused: Tensor) -> Tensor:
        valid = None if self._condenses_text() else text.valid  # latents have no padding
        return self._part("answer_decoder")(ids, fused, valid)

    def _condenses_text(self) -> bool:
        return FUSIONS[self.model_config["fusion"]["kind"]].condenses_text

    def _part(self, name: str):
        if not hasattr(self, name):
            raise ValueError(f"the checkpoint holds no {name}: it was trained without it")
        return getattr(self, name)


# --- reading an exported folder


def read_config(folder: Path) -> dict:
    """Read the `config.json` of an exported folder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no JSON, or of another format version; or the tensors are pickles.
    """
    path = folder / "config.json"
    if not path.is_file() and folder.suffix not in PICKLES:
        raise FileNotFoundError(f"{path}: no such file")
    refuse_pickles(folder)
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold an object")
    check_version(config, path)
    return config


def check_sums(folder: Path) -> None:
    """Raise ValueError if config or tensors are not what `SHA256SUMS` says, if that is there."""
    path = folder / "SHA256SUMS"
    if not path.is_file():
        return
    lines = path.read_text("utf-8", errors="replace").splitlines()
    sums = {name: value for value, _, name in (line.partition("  ") for line in lines)}
    for name in ("config.json", "model.safetensors"):
        digest = hashlib.sha256()
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        if sums.get(name) != digest.hexdigest():
            raise ValueError(
                f"{folder / name} is damaged: not what SHA256SUMS says (remove that if you have "
                "changed the file)"
            )


def check_version(config: dict, source: str | Path) -> None:
    """Raise ValueError for a config of another format version."""
    found = config.get("format_version")
    if found != FORMAT_VERSION:
        raise ValueError(f"{source}: format_version is {found!r}, but {FORMAT_VERSION} is needed")


def refuse_pickles(folder: Path) -> None:
    """Raise ValueError if the tensors exist as a pickle file only."""
    if (folder / "model.safetensors").is_file():
        return
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    for path in files:
        if path.suffix in PICKLES:
            raise ValueError(
                f"{path}: pickle files may run code and are not read: convert the tensors with "
                "safetensors.torch.save_file to model.safetensors"
            )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an exported folder, by name.

    Raises:
      FileNotFoundError: there is no model.safetensors.
      ValueError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError, with all differences in a line, unless names and shapes are equal."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        shape, wanted = list(found[name].shape), list(expected[name].shape)
        if shape != wanted:
            problems.append(f"{name} is {shape} instead of {wanted}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(problems[:5])}{more}")
