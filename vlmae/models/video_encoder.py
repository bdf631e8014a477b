"""Video encoder: a ViT over the visible patches of each frame alone (SMAUG).

`VitLayout` makes it one of the published families of vision transformers; with a joint layout
(VideoMAE) attention runs over all frames of a clip.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from vlmae.config.model import VideoEncoderConfig
from vlmae.models.adapter import ShallowAdapters
from vlmae.models.attention import even_tokens
from vlmae.models.blocks import Block, PruningBlock, vit_block
from vlmae.models.embeddings import (
    RelativeBias,
    resize_grid,
    sincos_clip_positions,
    sincos_positions,
)
from vlmae.models.layers import TOKEN_INIT, VIT_INIT, Compute, Dense
from vlmae.models.temporal import Temporal
from vlmae.ops.masking import SCHEMES, PatchMask
from vlmae.ops.registry import Registry
from vlmae.ops.token_pruning import size_bias


class VideoFeatures(NamedTuple):
    """Output of the video encoder."""

    tokens: Float[Array, "b t m d"]  # patch tokens, [CLS] not among them
    frame_cls: Float[Array, "b t d"]  # one vector a frame, see `FRAME_VECTORS`
    stage_patch_ids: tuple[Int[Array, "b t _"], ...]  # of the input, then of each pruning stage
    removed_mask: Bool[Array, "b t n"]  # True where a patch was masked before the encoder

    @property
    def patch_ids(self) -> Int[Array, "b t m"]:
        """The patch of each token; NO_PATCH for a fused token."""
        return self.stage_patch_ids[-1]

    @property
    def all_tokens(self) -> Float[Array, "b q d"]:
        """The tokens of all frames in one sequence, each frame after its `frame_cls`."""
        x = jnp.concatenate([self.frame_cls[:, :, None], self.tokens], axis=2)
        return rearrange(x, "b t m d -> b (t m) d")

    @property
    def frames_apart(self) -> "VideoFeatures":
        """The features of every frame as a clip of its own, in the order of clips and frames."""
        return jax.tree.map(lambda x: rearrange(x, "b t ... -> (b t) 1 ..."), self)


class VideoEncoder(nn.Module):
    """ViT over the visible patches of each frame; batch and time are folded.

    Attributes:
      config: sizes and options.
      grid: rows and columns of patches.
      keep_rate: fraction of the tokens that each pruning stage keeps.
      full_grid: rows and columns of a picture of full size, which fix the positions; None: `grid`.
    """

    config: VideoEncoderConfig
    grid: tuple[int, int]
    keep_rate: float = 1.0
    compute: Compute = Compute()
    full_grid: tuple[int, int] | None = None

    @nn.compact
    def __call__(
        self, patches: Float[Array, "b t n p"], mask: PatchMask | None = None
    ) -> VideoFeatures:
        """Encode the patches that `mask` keeps; without a mask, all of them.

        Removed patches are dropped before the first matrix product, so they cost nothing and get no
        gradient. Single images (t = 1) skip the temporal part.
        """
        b, t, n, _ = patches.shape
        if mask is None:
            kept_ids = jnp.broadcast_to(jnp.arange(n), (b, t, n))
            removed_mask = jnp.zeros((b, t, n), bool)
        else:
            kept_ids, removed_mask = mask
            patches = jnp.take_along_axis(patches, kept_ids[..., None], axis=2)

        # Time comes after space (Singularity-temporal): an image encoder's weights fit, and chunks
        # of frames can be encoded apart.
        x, stages = self._encode_chunks(patches, kept_ids)
        if t > 1 and (self.config.time_frames or self.config.time_depth):
            # Pruning keeps other patches in every frame, and so do most masks.
            scheme = self.config.mask.scheme
            is_per_clip = scheme != "none" and SCHEMES[scheme].is_per_clip
            aligned = (mask is None or is_per_clip) and len(stages) == 1
            temporal = Temporal(self.config, self.compute, name="temporal")
            # [CLS] gets an id that no patch has, so that it attends to the [CLS] of other frames.
            ids = jnp.pad(stages[-1], ((0, 0), (0, 0), (1, 0)), constant_values=n)
            x = temporal(x, ids, aligned)
        return VideoFeatures(x[:, :, 1:], x[:, :, 0], stages, removed_mask)

    def _encode_chunks(
        self, patches: Float[Array, "b t k p"], kept_ids: Int[Array, "b t k"]
    ) -> tuple[Float[Array, "b t q d"], tuple[Int[Array, "b t _"], ...]]:
        """Run `_encode` on some frames at a time; the backward pass encodes each chunk again."""
        size, frames = self.config.frames_per_chunk, patches.shape[1]
        if not size or frames <= size:
            return self._encode(patches, kept_ids)
        if frames % size:
            raise ValueError(
                f"model.video.frames_per_chunk={size} does not divide clips of {frames} frames"
            )

        def encode_chunk(encoder: VideoEncoder, carry: tuple, chunk: tuple) -> tuple:
            return carry, encoder._encode(*chunk)

        # All chunks share the parameters; each draws its own noise, as frames do without chunks.
        scan = nn.scan(
            # Without it the scan would keep the activations of all chunks, and save nothing.
            nn.remat(encode_chunk),
            variable_broadcast="params",
            split_rngs={"params": False, "noise": True},
        )
        chunks = [rearrange(x, "b (c t) k ... -> c b t k ...", t=size) for x in (patches, kept_ids)]
        _, encoded = scan(self, (), tuple(chunks))
        return jax.tree.map(lambda x: rearrange(x, "c b t m ... -> b (c t) m ..."), encoded)

    def _encode(
        self, patches: Float[Array, "b t k p"], kept_ids: Int[Array, "b t k"]
    ) -> tuple[Float[Array, "b t q d"], tuple[Int[Array, "b t _"], ...]]:
        """Return each frame's vector and tokens, normalized, and the patch ids at every stage."""
        t, layout = patches.shape[1], self.config.layout
        x = self._embed(patches, kept_ids)
        if layout.joint:
            x = rearrange(x, "(b t) q d -> b (t q) d", t=t)
        x, stages, sizes = self._blocks(x, rearrange(kept_ids, "b t k -> (b t) k"))
        if layout.joint:
            x = rearrange(x, "b (t q) d -> (b t) q d", t=t)
        tokens = x[:, layout.prefix :]
        vector = FRAME_VECTORS[layout.frame_cls](x, tokens, sizes)
        x = self._norm("norm")(jnp.concatenate([vector, tokens], axis=1))
        stages = tuple(rearrange(patch_ids, "(b t) m -> b t m", t=t) for patch_ids in stages)
        return rearrange(x, "(b t) q d -> b t q d", t=t), stages

    def _embed(
        self, patches: Float[Array, "b t k p"], kept_ids: Int[Array, "b t k"]
    ) -> Float[Array, "f q d"]:
        """Embed patches with their positions, [CLS] first, frames folded into the batch."""
        width, layout, t = self.config.width, self.config.layout, patches.shape[1]
        dtype = self.compute.dtype
        embed = Dense(width, compute=self.compute, kernel_init=VIT_INIT, name="patch_embed")
        prefix_positions, table = POSITIONS[self.config.positions](self, t)
        # Positions of the patches that are left: they are added before masking (MAE).
        if kept_ids.shape[-1] < table.shape[1]:
            table = table[jnp.arange(table.shape[0])[:, None], kept_ids]
        # Otherwise all are there, in their order: a gather by these constant ids would become a
        # constant of the program, as large as the tokens of a batch. Added in float32, in which a
        # table's gradient is summed.
        x = rearrange((embed(patches) + table).astype(dtype), "b t k d -> (b t) k d")
        # [CLS] gets a position even where it is zero, so that learned tables of published weights
        # fit.
        if layout.prefix:
            tokens = [self.param("cls", TOKEN_INIT, (width,))[None]]
            if layout.extra_tokens:
                tokens.append(self.param("extra", TOKEN_INIT, (layout.extra_tokens, width)))
            prefix = jnp.concatenate(tokens) + prefix_positions
            # Repeated in float32: its gradient is a sum over all frames.
            prefix = jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape)).astype(dtype)
            x = jnp.concatenate([prefix, x], axis=1)
        return self._norm("input_norm")(x) if layout.input_norm else x

    def _blocks(
        self, x: Float[Array, "f q d"], patch_ids: Int[Array, "g k"]
    ) -> tuple[Float[Array, "f r d"], list[Int[Array, "g _"]], Float[Array, "g _"] | None]:
        """Apply all blocks; return tokens, patch ids of the input and each stage, last sizes.

        With joint attention a row of tokens is a clip, but a row of patch ids is a frame.
        """
        # Ids of the input too: the first entry says what the mask kept.
        config, stages, sizes, branch = self.config, [patch_ids], None, None
        adapters = ShallowAdapters(config.adapter, self.compute, name="adapters")
        bias_kind = config.layout.relative_bias
        bias_of = RelativeBias(bias_kind, config.num_heads, self.grid, name="relative_bias")
        # A bias has the shape of its tokens, and is not for cuDNN; merged tokens have one.
        biased = bias_kind != "none" or config.sparsify.rest == "merge"
        kernel = "xla" if biased else self.compute.attention
        count = x.shape[1]
        x, lengths = even_tokens(x, kernel)
        for i in range(config.depth):
            # By the ids of this moment: pruning has moved the tokens.
            bias = bias_of(i, patch_ids)
            if sizes is not None:
                bias = size_bias(sizes) + (0.0 if bias is None else bias)
            if self.keep_rate < 1 and i in config.sparsify.stages:
                pruning = {"sparsify": config.sparsify, "keep_rate": self.keep_rate}
                block = self._block(i, PruningBlock, **pruning)
                # Without the padding, which must not be scored.
                x, patch_ids, sizes = block(x[:, :count], patch_ids, sizes, bias)
                stages.append(patch_ids)
                count = x.shape[1]
                x, lengths = even_tokens(x, kernel)
            else:
                x = self._block(i, Block)(x, lengths, bias=bias)
            x, branch = adapters(i, x, branch, lengths)
        return x[:, :count], stages, sizes

    def _block(self, i: int, kind: type[Block], **fields: object) -> Block:
        config, layout = self.config, self.config.layout
        return vit_block(
            config.num_heads,
            config.mlp_dim,
            self.compute,
            kind,
            eps=layout.eps,
            activation=layout.activation,
            layer_scale=layout.layer_scale,
            name=f"block_{i}",
            **fields,
        )

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.config.layout.eps, dtype=self.compute.dtype, name=name)


def mean_token(
    _: Array, tokens: Float[Array, "f m d"], sizes: Float[Array, "f m"] | None
) -> Float[Array, "f 1 d"]:
    """Return the mean of the patches: that of the tokens, weighted by their sizes."""
    if sizes is None:
        return tokens.mean(axis=1, keepdims=True)
    shares = (sizes / sizes.sum(axis=1, keepdims=True)).astype(tokens.dtype)
    return jnp.einsum("fm,fmd->fd", shares, tokens)[:, None]


# (all tokens of the frames, their patch tokens, sizes if merged) -> one vector a frame [f 1 d]
FRAME_VECTORS: Registry[Callable[[Array, Array, Array | None], Array]] = Registry(
    "frame_cls", {"token": lambda x, _, __: x[:, :1], "mean": mean_token}
)


# Positions of the prefix [c d], and of the patches at one time or at each [t n d].
Positions = tuple[Float[Array, "#c d"], Float[Array, "#t n d"]]


def sincos(encoder: VideoEncoder, _: int) -> Positions:
    """Give patches fixed 2-D positions, and the prefix none (MAE)."""
    width = encoder.config.width
    positions = sincos_positions(*encoder.grid, width, encoder.full_grid)
    return jnp.zeros((1, width)), jnp.asarray(positions)[None]


def learned(encoder: VideoEncoder, _: int) -> Positions:
    """Learn a position for each token of the prefix and each patch (ViT).

    The table is of the full grid. Smaller pictures read it interpolated, so that its gradient and
    Adam's moments keep their shape when the size changes within a run.
    """
    (rows, cols), prefix = encoder.full_grid or encoder.grid, encoder.config.layout.prefix
    shape = (prefix + rows * cols, encoder.config.width)
    table = encoder.param("positions", TOKEN_INIT, shape)
    if encoder.grid != (rows, cols):
        table = resize_grid(table, prefix + math.prod(encoder.grid))
    return table[:prefix], table[None, prefix:]


def sincos_clip(encoder: VideoEncoder, times: int) -> Positions:
    """Give all patches of a clip fixed 1-D positions (VideoMAE)."""
    (rows, cols), width = encoder.grid, encoder.config.width
    table = jnp.asarray(sincos_clip_positions(times * rows * cols, width))
    return jnp.zeros((1, width)), table.reshape(times, rows * cols, width)


def no_positions(encoder: VideoEncoder, _: int) -> Positions:
    """Give no positions; attention biases may stand in for them (BEiT)."""
    (rows, cols), width = encoder.grid, encoder.config.width
    return jnp.zeros((1, width)), jnp.zeros((1, rows * cols, width))


POSITIONS: Registry[Callable[[VideoEncoder, int], Positions]] = Registry(
    "positions",
    {
        "sincos": sincos,
        "learned": learned,
        "sincos_clip": sincos_clip,
        "none": no_positions,
    },
)
