"""A video-language model trained by vlmae, whole, in one file that needs nothing but torch.

    model = VideoLanguageModel.from_folder("exported")
    video = model.encode_video(frames)    # uint8 [b t h w 3]
    text = model.encode_text(ids, mask)   # int64 and bool [b l]; valid words come first
    scores = model.match(text, video)     # [b]: how well text i fits clip i

It computes what vlmae computes in evaluation: no dropout, no noise, evaluation's keep rates; masks
may be given. A parameter is named as in vlmae, with "." between the parts of its path. The config
is a plain dict, the `config.json` beside this file.

Shapes: b rows of a batch, t frames, f = b t frames, n patches of a frame, k visible ones, m tokens,
q tokens with [CLS], l and a words, s latents, d width, e shared space, c classes, v vocabulary.
"""

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
NO_PLACE = -1  # where a fused token stands
NEVER = -1e9  # the score of an answer that was not scored


# --- results


class VideoFeatures(NamedTuple):
    """What leaves the video encoder."""

    tokens: Tensor  # [b t m d], patch tokens; [CLS] is not among them
    frame_cls: Tensor  # [b t d], what stands for a frame: its [CLS], or its mean
    stage_places: tuple[Tensor, ...]  # [b t m] that entered, then after each thinning stage
    removed_mask: Tensor  # [b t n], True where a patch was masked

    @property
    def places(self) -> Tensor:
        """The patch at which each token stands [b t m]; NO_PLACE for a fused token."""
        return self.stage_places[-1]

    @property
    def all_tokens(self) -> Tensor:
        """The tokens of all frames in one sequence [b (t q) d], each frame led by its [CLS]."""
        return torch.cat([self.frame_cls[:, :, None], self.tokens], dim=2).flatten(1, 2)


class TextFeatures(NamedTuple):
    """What leaves the text encoder."""

    tokens: Tensor  # [b l d], [CLS] first
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
        """The mask with at least one word in each row [b l], so that no softmax is over nothing."""
        return prefix_mask(self.mask)


class FrameChoice(NamedTuple):
    """The frames of a clip that are kept for a text, and the scores of all of them."""

    frames: Tensor  # [b K], ascending
    scores: Tensor  # [b t], zero where nothing is scored


class Painted(NamedTuple):
    """Predicted pixels, in the space of the reconstruction target."""

    pixels: Tensor  # [b t s p], the values of a patch ordered (y, x, rgb)
    places: Tensor  # [b t s], the patch that each prediction is for


class Attended(NamedTuple):
    """What attention makes; queries and keys are for those who score tokens by them."""

    tokens: Tensor  # [b q d]
    query: Tensor  # [b h q e]
    key: Tensor  # [b h k e]


# --- layers


class Stacks(nn.Module):
    """A module whose lists of parts are named as in vlmae: block_0, block_1, ..."""

    def add_stack(self, name: str, parts) -> None:
        """Adds parts as NAME_0, NAME_1, ..."""
        for i, part in enumerate(parts):
            self.add_module(f"{name}_{i}", part)

    def stack(self, name: str) -> list:
        """The parts NAME_0, NAME_1, ..."""
        return [part for key, part in self.named_children() if key.rpartition("_")[0] == name]


class Attention(nn.Module):
    """Multi-head attention of tokens [b q d] to a context [b k e], or to themselves."""

    def __init__(self, width: int, num_heads: int, context_width: int = 0):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width or width, width)
        self.value = nn.Linear(context_width or width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Attended:
        """What x reads in the context.

        `mask` is True where a query may look at a key [b q k], or any query at a key [b k]; or it
        is a bias, which is added to the logits [b h q k].
        """
        query, key, value = map(
            self._heads, (self.query(x), self.key(context), self.value(context))
        )
        if mask is not None and mask.ndim < 4:
            mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        read = F.scaled_dot_product_attention(query, key, value, mask)
        return Attended(self.out(read.transpose(1, 2).flatten(2)), query, key)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers with an activation between them, the exact GELU or CLIP's quick one."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu"):
        super().__init__()
        self.is_quick = activation == "quick_gelu"
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Every token [... d] alone."""
        x = self.up(x)
        return self.down(x * torch.sigmoid(1.702 * x) if self.is_quick else F.gelu(x))


class Block(nn.Module):
    """A transformer block: self-attention, cross-attention if it has a context, feed-forward.

    Norms stand before each sublayer (ViT) or after its residual sum (BERT). With `layer_scale`
    learned factors scale what the sublayers add.
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
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = Attention(width, num_heads)
        self.attention_norm = nn.LayerNorm(width, eps)
        if context_width:
            self.cross_attention = Attention(width, num_heads, context_width)
            self.cross_attention_norm = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, activation)
        self.mlp_norm = nn.LayerNorm(width, eps)
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
        """All sublayers in turn, over tokens [b l d]; masks as in `Attention`."""
        x = self.self_attention(x, mask).tokens
        if context is not None:
            y = self.cross_attention_norm(x) if self.pre_norm else x
            x = x + self.cross_attention(y, context, context_mask).tokens
            x = x if self.pre_norm else self.cross_attention_norm(x)
        return self.feed_forward(x)

    def self_attention(self, x: Tensor, mask: Tensor | None = None) -> Attended:
        """The first sublayer, with its residual sum, and its queries and keys."""
        y = self.attention_norm(x) if self.pre_norm else x
        attended = self.attention(y, y, mask)
        x = x + scaled(attended.tokens, self.attention_scale)
        return attended._replace(tokens=x if self.pre_norm else self.attention_norm(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The last sublayer, with its residual sum."""
        if self.pre_norm:
            return x + scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale)
        return self.mlp_norm(x + self.mlp(x))


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Tokens [b l d] times a factor for each channel [d], if there is one."""
    return x if scale is None else x * scale


def bert_blocks(config: dict, depth: int, context_width: int = 0) -> list[Block]:
    """BERT layers of the text encoder's sizes, for the fusions and the answer decoder too."""
    sizes = (config["width"], config["num_heads"], config["mlp_dim"])
    options = {"pre_norm": False, "eps": BERT_EPS, "context_width": context_width}
    return [Block(*sizes, **options) for _ in range(depth)]


def prefix_mask(mask: Tensor) -> Tensor:
    """As many True at the front of each row [b l] as `mask` has there, at least one."""
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.arange(mask.shape[1], device=mask.device) < lengths


def take(x: Tensor, ids: Tensor) -> Tensor:
    """The tokens of x [... m d] at `ids` [... k]."""
    return x.gather(-2, ids[..., None].expand(*ids.shape, x.shape[-1]))


def best(scores: Tensor, count: int) -> Tensor:
    """Where the `count` highest of each row [b m] are, ascending."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def baseline_noise(count: int) -> Tensor:
    """The uniform noise in [0, 1) by which vlmae's random baselines choose in evaluation [count].

    JAX's Threefry-2x32 with key 0 over a counter (Salmon et al. 2011), so that the choice is equal.
    """
    keys, word = (0, 0, 0x1BD11BDA), 0xFFFFFFFF
    x, y = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    for i in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = (x + y) & word
            y = ((y << bits | y >> (32 - bits)) & word) ^ x
        x = (x + keys[(i + 1) % 3]) & word
        y = (y + keys[(i + 2) % 3] + i + 1) & word
    return ((x ^ y) >> 9).to(torch.float32) / 2**23


# --- the video encoder


def random_mask(noise: Tensor, ratio: float) -> Tensor:
    """Places of the patches that stay visible [b t k]: those of the lowest noise [b t n] (MAE)."""
    keep = max(1, math.floor(noise.shape[-1] * (1 - ratio) + 1e-6))
    return noise.argsort(dim=-1, stable=True)[..., :keep].sort(dim=-1).values


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [side*side d]: half of the channels for x, half for y."""
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    x, y = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([x, y], dim=1).to(torch.float32)


def sincos_clip_positions(num_places: int, width: int) -> Tensor:
    """Fixed 1-D sine-cosine positions [n d]; even channels are sines, odd ones not (VideoMAE)."""
    channel = torch.arange(width)
    frequencies = 1.0 / 10000 ** ((channel - channel % 2).double() / width)
    angles = torch.arange(num_places, dtype=torch.float64)[:, None] * frequencies
    return torch.where(channel % 2 == 1, angles.cos(), angles.sin()).to(torch.float32)


class RelativeBias(nn.Module):
    """Attention biases by where two patches stand to each other: one table, or one a block (BEiT).

    A table holds every offset of two patches, then [CLS] to patch, patch to [CLS], [CLS] itself.
    """

    def __init__(self, kind: str, depth: int, num_heads: int, side: int):
        super().__init__()
        self.side, self.is_shared = side, kind == "shared"
        for name in ["shared"] if self.is_shared else [f"block_{i}" for i in range(depth)]:
            table = torch.zeros((2 * side - 1) ** 2 + 3, num_heads)
            self.register_parameter(name, nn.Parameter(table))

    def forward(self, block: int, places: Tensor) -> Tensor:
        """The bias [f h q q] between [CLS] and the patches at `places` [f m] in a block.

        A fused token stands nowhere: nothing is added to or from it.
        """
        table = self.get_parameter("shared" if self.is_shared else f"block_{block}")
        span, last = 2 * self.side - 1, len(table) - 1
        y, x = places // self.side, places % self.side
        dy, dx = (z[:, :, None] - z[:, None, :] + self.side - 1 for z in (y, x))
        entries = F.pad(dy * span + dx, (1, 0, 1, 0), value=last)
        entries[:, 0, 1:], entries[:, 1:, 0] = last - 2, last - 1
        somewhere = F.pad(places != NO_PLACE, (1, 0), value=True)
        both = somewhere[:, :, None] & somewhere[:, None, :]
        return (table[entries * both] * both[..., None]).permute(0, 3, 1, 2)


def importance(attended: Attended, score: str, bias: Tensor | None = None) -> Tensor:
    """How important each token but [CLS] is [f m], by the block's own attention or a baseline."""
    tokens = attended.tokens[:, 1:]
    if score in ("norm", "random"):
        noise = baseline_noise(tokens.shape[1]).to(tokens).expand(tokens.shape[:2])
        values = tokens.norm(dim=-1) if score == "norm" else noise
        return values / values.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    rows = slice(1) if score == "cls_attention" else slice(None)
    query = attended.query[:, :, rows]
    logits = query @ attended.key.transpose(2, 3) / math.sqrt(query.shape[-1])
    logits = logits if bias is None else logits + bias[:, :, rows]
    return logits.softmax(dim=-1)[..., 1:].mean(dim=(1, 2))


def thin(
    tokens: Tensor, places: Tensor, scores: Tensor, keep_rate: float, rest: str
) -> tuple[Tensor, Tensor]:
    """Keeps [CLS] and the tokens of the highest scores, in the order they had (EViT, SMAUG).

    Of tokens [f q d], their places and scores [f m]; with `rest` "fuse" the others become one
    token, their sum weighted by score. Returns tokens and places.
    """
    count = min(scores.shape[1], max(1, math.ceil(scores.shape[1] * keep_rate - 1e-6)))
    if count == scores.shape[1]:
        return tokens, places
    kept, others = best(scores, count), tokens[:, 1:]
    tokens = torch.cat([tokens[:, :1], take(others, kept)], dim=1)
    places = places.gather(1, kept)
    if rest == "drop":
        return tokens, places
    fused = scores.scatter(1, kept, 0.0)[:, None] @ others
    nowhere = torch.full_like(places[:, :1], NO_PLACE)
    return torch.cat([tokens, fused], dim=1), torch.cat([places, nowhere], dim=1)


class Adapter(nn.Module):
    """Up(attention(Down(LN x))): what is added to the features of a frozen block (MuLTI)."""

    def __init__(self, config: dict, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, VIT_EPS)
        self.down = nn.Linear(width, config["width"])
        self.attention = Attention(config["width"], config["num_heads"])
        self.up = nn.Linear(config["width"], width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The correction of x [b l d]."""
        y = self.down(self.norm(x))
        return self.up(self.attention(y, y, mask).tokens)


class ShallowAdapters(Stacks):
    """The adapters of an encoder's first blocks: in the stream, or beside it and added last."""

    def __init__(self, config: dict, width: int):
        super().__init__()
        self.is_inline = config["kind"] == "inline"
        self.count = config["frozen_blocks"] if config["kind"] != "none" else 0
        self.add_stack("block", (Adapter(config, width) for _ in range(self.count)))

    def forward(
        self, block: int, x: Tensor, branch: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream and the side branch after a block of this number."""
        if block >= self.count:
            return x, branch
        added = self.get_submodule(f"block_{block}")(x, mask)
        if self.is_inline:
            return x + added, None
        branch = added if branch is None else branch + added
        return (x + branch if block == self.count - 1 else x), branch


class Temporal(Stacks):
    """What lets a frame know the others: embeddings of time, attention over frames at one place."""

    def __init__(self, config: dict):
        super().__init__()
        width, sizes = config["width"], (config["num_heads"], config["mlp_dim"])
        if config["time_frames"]:
            self.embedding = nn.Parameter(torch.zeros(config["time_frames"], width))
        self.add_stack("block", (Block(width, *sizes) for _ in range(config["time_depth"])))

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Tokens [b t q d], of which those at equal places [b t q] see each other."""
        t = tokens.shape[1]
        if hasattr(self, "embedding"):
            size = (t, tokens.shape[3])
            table = F.interpolate(self.embedding[None, None], size, mode="bilinear", antialias=True)
            tokens = tokens + table[0, 0, :, None]
        x, places = tokens.flatten(1, 2), places.flatten(1)
        mask = places[:, :, None] == places[:, None]
        for block in self.stack("block"):
            x = block(x, mask)
        return x.unflatten(1, (t, -1))


class VideoEncoder(Stacks):
    """A ViT over the visible patches of each frame, which may thin its tokens on the way.

    The config's `layout` makes it one of the published families of vision transformers.
    """

    def __init__(self, config: dict, side: int, has_time: bool):
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
        """Encodes the patches [b t n p] at `kept_ids` [b t k]; by default all."""
        b, t, n, _ = patches.shape
        if kept_ids is None:
            kept_ids = torch.arange(n, device=patches.device).expand(b, t, n)
        removed_mask = patches.new_ones(b, t, n, dtype=torch.bool).scatter(2, kept_ids, False)
        x = self._embed(take(patches, kept_ids), kept_ids)
        is_joint = self.config["layout"]["joint"]  # attention over all frames of a clip
        x, stages = self._blocks(x.flatten(1, 2) if is_joint else x.flatten(0, 1), kept_ids)
        x = self._led(x.unflatten(1, (t, -1)) if is_joint else x.unflatten(0, (b, t)))
        stages = tuple(places.unflatten(0, (b, t)) for places in stages)
        if t > 1 and (self.config["time_frames"] or self.config["time_depth"]):
            if not hasattr(self, "temporal"):
                raise ValueError("this model was trained on images alone: it encodes single frames")
            cls_place = torch.full_like(stages[-1][:, :, :1], n)
            x = self.temporal(x, torch.cat([cls_place, stages[-1]], dim=2))
        return VideoFeatures(x[:, :, 1:], x[:, :, 0], stages, removed_mask)

    def _embed(self, patches: Tensor, kept_ids: Tensor) -> Tensor:
        """Tokens with positions [b t q d], [CLS] and extra ones first."""
        b, t = patches.shape[:2]
        leading, table = self._positions(t)
        x = self.patch_embed(patches) + take(table.expand(b, -1, -1, -1), kept_ids)
        if self.prefix:
            tokens = torch.cat([self.cls[None], getattr(self, "extra", self.cls[:0])]) + leading
            x = torch.cat([tokens.expand(b, t, -1, -1), x], dim=2)
        return self.input_norm(x)

    def _led(self, x: Tensor) -> Tensor:
        """The normalized patch tokens of a frame after what stands for it: [CLS] or their mean."""
        patches = x[:, :, self.prefix :]
        is_mean = self.config["layout"]["frame_cls"] == "mean"
        first = patches.mean(dim=2, keepdim=True) if is_mean else x[:, :, :1]
        return self.norm(torch.cat([first, patches], dim=2))

    def _blocks(self, x: Tensor, kept_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The tokens after all blocks; their places [f m] at the start and every stage."""
        places, branch, sparsify = kept_ids.flatten(0, 1), None, self.config["sparsify"]
        stages, keep_rate, bias = [places], sparsify["eval_keep_rate"], None
        for i, block in enumerate(self.stack("block")):
            if hasattr(self, "relative_bias"):
                bias = self.relative_bias(i, places)
            if keep_rate < 1 and i in sparsify["stages"]:
                attended = block.self_attention(x, bias)
                scores = importance(attended, sparsify["score"], bias)
                x, places = thin(attended.tokens, places, scores, keep_rate, sparsify["rest"])
                x = block.feed_forward(x)
                stages.append(places)
            else:
                x = block(x, bias)
            x, branch = self.adapters(i, x, branch)
        return x, stages

    def _positions(self, t: int) -> tuple[Tensor, Tensor]:
        """What is added to the leading tokens [c d], and to the patches at each time [t n d]."""
        kind, width, like = self.config["positions"], self.config["width"], self.norm.weight
        if kind == "learned":
            return self.positions[: self.prefix], self.positions[self.prefix :].expand(t, -1, -1)
        if kind == "sincos_clip":
            table = sincos_clip_positions(t * self.side**2, width).unflatten(0, (t, -1))
        else:
            table = sincos_positions(self.side, width).expand(t, -1, -1) * (kind != "none")
        return like.new_zeros(1, width), table.to(like)


def patch_pixels(config: dict) -> int:
    """Values of a patch, by the config of the video encoder."""
    return 3 * config["layout"]["tubelet"] * config["patch_size"] ** 2


# --- the text encoder


class BertEmbeddings(nn.Module):
    """Word + position + token-type embeddings and a layer norm (BERT)."""

    def __init__(self, config: dict):
        super().__init__()
        width = config["width"]
        self.word = nn.Embedding(config["vocab_size"], width)
        self.position = nn.Embedding(config["max_len"], width)
        self.token_type = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, BERT_EPS)

    def forward(self, ids: Tensor) -> Tensor:
        """Tokens [b l d] of word ids [b l]."""
        positions = self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.norm(self.word(ids) + positions + self.token_type(torch.zeros_like(ids)))

    def scores(self, x: Tensor) -> Tensor:
        """The product of tokens with the word table [b l v]."""
        return x @ self.word.weight.T


class TextEncoder(Stacks):
    """The lower layers of a BERT encoder."""

    def __init__(self, config: dict):
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.add_stack("block", bert_blocks(config, config["depth"]))
        self.adapters = ShallowAdapters(config["adapter"], config["width"])

    def forward(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Encodes word ids [b l]; `mask` is True on real words, which come first in each row."""
        x, valid, branch = self.embeddings(ids), prefix_mask(mask), None
        for i, block in enumerate(self.stack("block")):
            x, branch = self.adapters(i, block(x, valid), branch, valid)
        return TextFeatures(x, mask)


# --- which frames the fusion reads


class FrameSelector(Stacks):
    """Scores the frames of a clip for a text and chooses the best (SMAUG), or is a baseline."""

    def __init__(self, config: dict, text_width: int, video_width: int):
        super().__init__()
        self.config, self.kind, width = config, config["kind"], config["width"]
        if self.kind not in ("mlp", "transformer"):
            return
        self.frame_norm = nn.LayerNorm(video_width, VIT_EPS)
        self.text_norm = nn.LayerNorm(text_width, VIT_EPS)
        if self.kind == "mlp":
            self.hidden = nn.Linear(video_width + text_width, video_width)
            self.score = nn.Linear(video_width, 1)
        else:
            self.frame_embed = nn.Linear(video_width, width)
            self.text_embed = nn.Linear(text_width, width)
            blocks = (Block(width, config["num_heads"], 4 * width) for _ in range(config["depth"]))
            self.add_stack("block", blocks)
            self.norm = nn.LayerNorm(width, VIT_EPS)
            self.score = nn.Linear(width, 1)

    def forward(self, text: TextFeatures, video: VideoFeatures) -> FrameChoice:
        """The frames of clip i for text i."""
        b, t = video.frame_cls.shape[:2]
        count = min(t, self.config["frames"] or max(1, t // 2))
        zeros = video.frame_cls.new_zeros(b, t)
        if self.kind == "uniform":
            middles = [(2 * i + 1) * t // (2 * count) for i in range(count)]
            return FrameChoice(torch.tensor(middles, device=zeros.device).expand(b, -1), zeros)
        if self.kind == "random":
            return FrameChoice(best(zeros + baseline_noise(t).to(zeros), count), zeros)
        scores = (self._mlp if self.kind == "mlp" else self._transformer)(text, video)
        return FrameChoice(best(scores, count), scores)

    def _mlp(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        frames, words = self.frame_norm(video.frame_cls), self.text_norm(text.cls)
        words = words[:, None].expand(-1, frames.shape[1], -1)
        return self.score(F.gelu(self.hidden(torch.cat([frames, words], dim=2))))[..., 0]

    def _transformer(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        frames = self.frame_embed(self.frame_norm(video.frame_cls))
        words = self.text_embed(self.text_norm(text.cls))
        x = torch.cat([words[:, None], frames], dim=1)
        for block in self.stack("block"):
            x = block(x)
        return self.score(self.norm(x[:, 1:]))[..., 0]


def keep_frames(video: VideoFeatures, frames: Tensor) -> VideoFeatures:
    """The features of the chosen frames [b K]."""
    # shape[0], not len(), here and below: a traced model keeps its batch symbolic.
    rows = torch.arange(frames.shape[0], device=frames.device)[:, None]
    tokens, frame_cls, stages, removed_mask = video
    kept_stages = tuple(places[rows, frames] for places in stages)
    return VideoFeatures(
        tokens[rows, frames], frame_cls[rows, frames], kept_stages, removed_mask[rows, frames]
    )


# --- where text and video meet


class CrossAttentionFusion(Stacks):
    """Layers of text self-attention, cross-attention to all video tokens, feed-forward (SMAUG)."""

    def __init__(self, config: dict, text: dict, video_width: int):
        super().__init__()
        self.add_stack("block", bert_blocks(text, config["depth"], video_width))

    def forward(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """The text tokens [b l d] after they have read the tokens of all frames."""
        x, context = text.tokens, video.tokens.flatten(1, 2)
        for block in self.stack("block"):
            x = block(x, text.valid, context)
        return x


class ConcatFusion(Stacks):
    """BERT layers of self-attention over all tokens of video and text together (as in ALPRO)."""

    def __init__(self, config: dict, text: dict, video_width: int):
        super().__init__()
        self.video_embed = to_width(video_width, text["width"])
        self.add_stack("block", bert_blocks(text, config["depth"]))

    def forward(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """The text tokens [b l d] after they have met the tokens of all frames."""
        tokens = self.video_embed(video.all_tokens)
        x = torch.cat([tokens, text.tokens], dim=1)
        seen = torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device)
        for block in self.stack("block"):
            x = block(x, torch.cat([seen, text.valid], dim=1))
        return x[:, tokens.shape[1] :]


def to_width(width: int, wanted: int) -> nn.Module:
    """A linear map between widths; nothing between equal ones."""
    return nn.Identity() if width == wanted else nn.Linear(width, wanted)


class AdaptPooling(nn.Module):
    """What a sampler's latents start from: the source itself, pooled (MuLTI)."""

    def __init__(self, kind: str, width: int, num_heads: int, num_latents: int):
        super().__init__()
        self.kind = kind
        if kind != "mean":
            self.source_norm = nn.LayerNorm(width, VIT_EPS)
        if kind == "attention":
            self.norm = nn.LayerNorm(width, VIT_EPS)
            self.attention = Attention(width, num_heads)
        elif kind != "mean":
            self.importance = nn.Linear(width, num_latents if kind == "global" else 1)

    def forward(self, queries: Tensor, source: Tensor, valid: Tensor) -> Tensor:
        """One token for each query [b s d], of the source [b m d] where it is `valid` [b m]."""
        if self.kind == "attention":
            return self.attention(self.norm(queries), self.source_norm(source), valid).tokens
        scores = source.new_zeros(1, 1, source.shape[1])
        if self.kind != "mean":
            scores = self.importance(self.source_norm(source)).transpose(1, 2)
        members = valid[:, None]
        if self.kind != "global":
            members = block_members(valid, queries.shape[1])
        return scores.masked_fill(~members, -math.inf).softmax(dim=-1) @ source


def block_members(valid: Tensor, num_blocks: int) -> Tensor:
    """Which tokens are in each of contiguous blocks of nearly equal size [b s m].

    Block i of n valid tokens begins at floor(i n / s) and ends before ceil((i + 1) n / s).
    """
    lengths, block = valid.sum(dim=1, keepdim=True), torch.arange(num_blocks, device=valid.device)
    start, end = block * lengths // num_blocks, -(-(block + 1) * lengths // num_blocks)
    token = torch.arange(valid.shape[1], device=valid.device)
    return (start[..., None] <= token) & (token < end[..., None])


class WayLayer(nn.Module):
    """Latents read themselves and a source by an attention that ways may share; feed-forward."""

    def __init__(self, width: int, hidden: int, has_source: bool):
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
        """The latents [b s d] after one layer, of a source [b m d] where it is `valid` [b m]."""
        query = context = self.norm(z)
        if source is not None:
            context = torch.cat([query, self.source_norm(source)], dim=1)
            valid = torch.cat([valid.new_ones(z.shape[:2]), valid], dim=1)
        z = z + attention(query, context, valid).tokens
        return z + self.mlp(self.mlp_norm(z))


class Sampler(nn.Module):
    """A sequence of any length condensed to a fixed number of latents."""

    def __init__(self, num_latents: int, pooling: str, width: int, num_heads: int):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(num_latents, width))
        if pooling != "none":
            self.pooling = AdaptPooling(pooling, width, num_heads, num_latents)
        self.norm = nn.LayerNorm(width, VIT_EPS)

    def forward(
        self,
        source: Tensor,
        valid: Tensor,
        layers: list,
        guide: Tensor | None = None,
        guidance: str = "none",
    ) -> Tensor:
        """The latents [b s d] of a source [b m d], by (layer, attention) pairs.

        Latents of the other modality may guide them, among the keys ("context") or the queries.
        """
        z = self.latents.expand(source.shape[0], -1, -1)
        if hasattr(self, "pooling"):
            z = z + self.pooling(z, source, valid)
        if guidance == "queries":
            z = torch.cat([z, guide], dim=1)
        if guidance == "context":
            source = torch.cat([guide, source], dim=1)
            valid = torch.cat([valid.new_ones(guide.shape[:2]), valid], dim=1)
        for layer, attention in layers:
            z = layer(z, attention, source, valid)
        return self.norm(z[:, : len(self.latents)])


class MultiWayFusion(Stacks):
    """Text and video condensed, then fused, three ways through shared attention (MuLTI)."""

    def __init__(self, config: dict, text: dict, video_width: int):
        super().__init__()
        sampler, width, heads = config["sampler"], text["width"], text["num_heads"]
        self.is_shared, self.guidance = sampler["share_attention"], sampler["guidance"]
        for way in ("shared",) if self.is_shared else ("text", "video", "fused"):
            attentions = (Attention(width, heads) for _ in range(config["depth"]))
            self.add_stack(f"{way}_attention", attentions)
        for way in ("text", "video", "fused"):
            layer = (width, text["mlp_dim"], way != "fused")
            self.add_stack(f"{way}_layers", (WayLayer(*layer) for _ in range(config["depth"])))
        pooling = (sampler["pooling"], width, heads)
        self.text_sampler = Sampler(sampler["text_latents"], *pooling)
        self.video_sampler = Sampler(sampler["video_latents"], *pooling)
        self.norm = nn.LayerNorm(width, VIT_EPS)
        self.video_embed = to_width(video_width, width)

    def forward(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """The text's [CLS], the text latents and the video latents [b q d], after they have met."""
        tokens = self.video_embed(video.all_tokens)
        words = self.text_sampler(text.tokens, text.valid, self._way("text"))
        seen = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        frames = self.video_sampler(tokens, seen, self._way("video"), words, self.guidance)
        z = torch.cat([text.cls[:, None], words, frames], dim=1)
        for layer, attention in self._way("fused"):
            z = layer(z, attention)
        return self.norm(z)

    def _way(self, name: str) -> list:
        attention = self.stack("shared_attention" if self.is_shared else f"{name}_attention")
        return list(zip(self.stack(f"{name}_layers"), attention, strict=True))


class WordReader(nn.Module):
    """The words of a text, each read back from the fused latents."""

    def __init__(self, text: dict):
        super().__init__()
        width = text["width"]
        self.attention = Attention(width, text["num_heads"])
        self.norm, self.mlp_norm = nn.LayerNorm(width, VIT_EPS), nn.LayerNorm(width, VIT_EPS)
        self.mlp = Mlp(width, text["mlp_dim"])

    def forward(self, text: TextFeatures, fused: Tensor) -> Tensor:
        """Text tokens [b l d] that have read the fused ones [b q d]."""
        x = text.tokens + self.attention(self.norm(text.tokens), fused).tokens
        return x + self.mlp(self.mlp_norm(x))


FUSIONS = {
    "cross_attention": CrossAttentionFusion,
    "concat": ConcatFusion,
    "multiway": MultiWayFusion,
}


# --- heads and decoders


class Projection(nn.Module):
    """A linear map into the shared space, then unit length."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        self.dense = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors [... e] of features [... d]."""
        y = self.dense(x)
        return y / y.norm(dim=-1, keepdim=True).clamp(min=1e-6)


class WordTransform(nn.Module):
    """BERT's transform before the word scores: linear, exact GELU, layer norm."""

    def __init__(self, width: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, BERT_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Every token [... d] alone."""
        return self.norm(F.gelu(self.dense(x)))


class Classifier(nn.Module):
    """Two linear maps with an exact GELU between: d -> 2d -> classes (MuLTI)."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.hidden, self.classes = nn.Linear(width, 2 * width), nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b c] of features [b d]."""
        return self.classes(F.gelu(self.hidden(x)))


class AnswerDecoder(Stacks):
    """Words of an answer, each from those before it and the fused question (SMAUG)."""

    def __init__(self, text: dict, depth: int):
        super().__init__()
        self.embeddings = BertEmbeddings(text)
        self.add_stack("block", bert_blocks(text, depth, text["width"]))
        self.word_transform = WordTransform(text["width"])
        self.word_bias = nn.Parameter(torch.zeros(text["vocab_size"]))

    def forward(self, ids: Tensor, fused: Tensor, valid: Tensor | None) -> Tensor:
        """Logits [b a v] of the word after each of `ids` [b a], by the `valid` of `fused`."""
        x, a = self.embeddings(ids), ids.shape[1]
        causal = torch.ones(a, a, dtype=torch.bool, device=ids.device).tril()[None]
        for block in self.stack("block"):
            x = block(x, causal, fused, valid)
        return self.embeddings.scores(self.word_transform(x)) + self.word_bias


class PixelDecoder(Stacks):
    """The light transformer that paints the removed patches (MAE's decoder, frame by frame)."""

    def __init__(self, config: dict, side: int, video_width: int, patch_pixels: int):
        super().__init__()
        self.side, width = side, config["width"]
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.embed = nn.Linear(video_width, width)
        blocks = (Block(width, config["num_heads"], 4 * width) for _ in range(config["depth"]))
        self.add_stack("block", blocks)
        self.norm = nn.LayerNorm(width, VIT_EPS)
        self.pixels = nn.Linear(width, patch_pixels)

    def forward(self, video: VideoFeatures, places: Tensor | None = None) -> Painted:
        """The pixels of every patch of every frame, or of the patches at `places` [b t s]."""
        b, t, n = video.removed_mask.shape
        cls, tokens = self.embed(video.frame_cls)[:, :, None], self.embed(video.tokens)
        x = tokens.new_zeros(b, t, n + 1, tokens.shape[3]) + self.mask_token
        # Slot n takes the fused tokens, which stand nowhere, and is cut off.
        slots = torch.where(video.places == NO_PLACE, n, video.places)
        x = x.scatter(2, slots[..., None].expand_as(tokens), tokens)[:, :, :n]
        x = x + sincos_positions(self.side, x.shape[3]).to(x)
        if places is None:
            places = torch.arange(n, device=x.device).expand(b, t, n)
        else:
            x = take(x, places)
        x = torch.cat([cls, x], dim=2).flatten(0, 1)
        for block in self.stack("block"):
            x = block(x)
        return Painted(self.pixels(self.norm(x[:, 1:])).unflatten(0, (b, t)), places)


# --- the model


class VideoLanguageModel(nn.Module):
    """SMAUG's and MuLTI's model, with the parts that its checkpoint holds.

    A method that needs another part raises ValueError and names it.
    """

    def __init__(self, config: dict):
        """Builds the model of a `config.json`; its parameters are to be loaded.

        Raises:
          ValueError: the config is of another format version, or names an unknown part.
        """
        super().__init__()
        self.build(config)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "VideoLanguageModel":
        """The model of an exported folder, ready for evaluation.

        Raises:
          FileNotFoundError: there is no config.json or no model.safetensors.
          ValueError: a file is damaged, of another version, a pickle, or does not fit the other.
        """
        folder = Path(folder)
        config, tensors = read_config(folder), read_tensors(folder)
        with torch.device("meta"):
            model = cls(config)
        check_tensors(tensors, model.state_dict(), folder / "model.safetensors")
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def build(self, config: dict) -> None:
        """Makes the parts; apart from `__init__`, for subclasses that begin otherwise."""
        check_version(config, "the config")
        model, self.image_size = config["model"], config["image_size"]
        self.model_config, self.parts = model, tuple(config["parts"])
        video, text = model["video"], model["text"]
        side, width = self.image_size // video["patch_size"], text["width"]
        makers = {
            "video_encoder": lambda: VideoEncoder(
                video, side, "video_encoder.temporal" in self.parts
            ),
            "text_encoder": lambda: TextEncoder(text),
            "frame_selector": lambda: FrameSelector(model["selector"], width, video["width"]),
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
        """The matching scores [b] of text i with clip i: `match` of what the encoders make."""
        return self.match(self.encode_text(ids, mask), self.encode_video(video))

    def patches(self, video: Tensor) -> Tensor:
        """The normalized pixels of every patch [b t n p], ordered (frame, y, x, rgb).

        Of uint8 frames [b f h w 3]; a patch covers one frame or, in a tubelet, several. A single
        image is repeated to a tubelet.
        """
        if video.shape[2:] != (self.image_size, self.image_size, 3):
            size = f"{self.image_size} {self.image_size} 3"
            raise ValueError(f"frames must be [b f {size}], not {list(video.shape)}")
        config, layout = self.model_config["video"], self.model_config["video"]["layout"]
        mean, std = (torch.tensor(layout[x]).to(video.device) for x in ("pixel_mean", "pixel_std"))
        x, p, tubelet = (video.float() / 255 - mean) / std, config["patch_size"], layout["tubelet"]
        if x.shape[1] == 1:
            x = x.expand(-1, tubelet, -1, -1, -1)
        if x.shape[1] % tubelet:
            raise ValueError(f"clips of {x.shape[1]} frames do not divide into {tubelet}s")
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).unflatten(1, (-1, tubelet))
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)  # b t y x f p q c
        return x.flatten(4).flatten(2, 3).to(next(self.parameters()).dtype)

    def encode_video(self, video: Tensor, kept_ids: Tensor | None = None) -> VideoFeatures:
        """Encodes uint8 frames [b t h w 3]; of each the patches at `kept_ids` [b t k], or all."""
        return self._part("video_encoder")(self.patches(video), kept_ids)

    def encode_text(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Encodes word ids [b l]; `mask` is True on real words, which come first."""
        return self._part("text_encoder")(ids, mask.bool())

    def embed_video(self, video: VideoFeatures) -> Tensor:
        """Unit vectors of the frames [b t e]; a clip is compared by their mean."""
        return self._part("video_projection")(video.frame_cls)

    def embed_text(self, text: TextFeatures) -> Tensor:
        """Unit vectors of the texts [b e]."""
        return self._part("text_projection")(getattr(text, self.model_config["text"]["pooling"]))

    def similarity(self, video: VideoFeatures, text: TextFeatures) -> Tensor:
        """How alike each clip and each text are [b c], over the learned temperature."""
        cosines = self.embed_video(video).mean(dim=1) @ self.embed_text(text).T
        return cosines / self._part("temperature").clamp(*TEMPERATURE_RANGE)

    def choose_frames(self, text: TextFeatures, video: VideoFeatures) -> FrameChoice | None:
        """The frames of clip i that the fusion reads for text i; None where it reads all."""
        if self.model_config["selector"]["kind"] == "none" or video.tokens.shape[1] == 1:
            return None
        return self._part("frame_selector")(text, video)

    def fuse(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """Tokens of text i and clip i that have met [b q d], the text's [CLS] first."""
        choice = self.choose_frames(text, video)
        return self._part("fusion")(
            text, video if choice is None else keep_frames(video, choice[0])
        )

    def match(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """How well text i fits clip i [b]: the logit of a match minus that of none."""
        logits = self._part("match_head")(self.fuse(text, video)[:, 0])
        return logits[:, 1] - logits[:, 0]

    def choose(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """Logits [b c] of the options that text i lists; or [b 1], the score of one option."""
        return self._part("choice_head")(self.fuse(text, video)[:, 0])

    def word_logits(self, text: TextFeatures, video: VideoFeatures) -> Tensor:
        """Logits [b l v] of every word at every place of the text."""
        words = self.fuse(text, video)
        if self.model_config["fusion"]["kind"] == "multiway":
            words = self._part("word_reader")(text, words)
        scores = self.text_encoder.embeddings.scores(self._part("word_transform")(words))
        return scores + self.word_bias

    def decode_pixels(self, video: VideoFeatures) -> Painted:
        """Predicted pixels of every patch."""
        return self._part("pixel_decoder")(video)

    def answer(
        self,
        text: TextFeatures,
        video: VideoFeatures,
        answers: tuple[Tensor, Tensor] | None = None,
        top_k: int = 128,
    ) -> Tensor:
        """Scores [b c] of the answers to question i about clip i, or of the labels of the clip.

        Without `answers` the logits of the classifier. With the ids and mask [c a] of answers
        ([CLS] words [SEP]) the log-probabilities that the decoder gives them; only those of the
        `top_k` likeliest first words are scored whole, the others get NEVER.
        """
        fused = self.fuse(text, video)
        if answers is None:
            return self._part("classifier")(fused[:, 0])
        (ids, mask), b = answers, fused.shape[0]
        k = min(top_k, len(ids))
        first = self._decode(ids[:1, :1].expand(b, 1), text, fused)[:, 0]
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
        """The log-probability [b] of each whole answer [b a], given its fused question."""
        log_p = self._decode(ids[:, :-1], text, fused).log_softmax(dim=-1)
        log_p = log_p.gather(2, ids[:, 1:, None])[..., 0]
        return log_p.masked_fill(~mask[:, 1:].bool(), 0.0).sum(dim=1)

    def _decode(self, ids: Tensor, text: TextFeatures, fused: Tensor) -> Tensor:
        """Logits [b a v] of the word after each word; the multiway latents are all valid."""
        is_multiway = self.model_config["fusion"]["kind"] == "multiway"
        return self._part("answer_decoder")(ids, fused, None if is_multiway else text.valid)

    def _part(self, name: str):
        if not hasattr(self, name):
            raise ValueError(f"the checkpoint holds no {name}: it was trained without it")
        return getattr(self, name)


# --- reading an exported folder


def read_config(folder: Path) -> dict:
    """The `config.json` of an exported folder, of a version that this file reads."""
    path = folder / "config.json"
    if not path.is_file() and folder.suffix not in PICKLES:
        raise FileNotFoundError(f"{path}: no such file")
    refuse_pickles(folder)
    try:
        config = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    check_version(config, path)
    return config


def check_version(config: dict, source: str | Path) -> None:
    """Raises ValueError for a config of another format version."""
    found = config.get("format_version")
    if found != FORMAT_VERSION:
        raise ValueError(f"{source}: format_version is {found}, but {FORMAT_VERSION} is needed")


def refuse_pickles(folder: Path) -> None:
    """Raises ValueError where the tensors are only there as a pickle file."""
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
    """The tensors of an exported folder, by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError, with all differences in a line, unless names and shapes are equal."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        shape, wanted = list(found[name].shape), list(expected[name].shape)
        if shape != wanted:
            problems.append(f"{name} is {shape} instead of {wanted}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(problems[:5])}{more}")
