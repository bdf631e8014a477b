"""Frames in, visible tokens out: a ViT that encodes every frame alone (SMAUG, video encoder).

`VitLayout` makes it one of the published families; one of them attends to all frames at once.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from vlmae.masking import PatchMask
from vlmae.model_config import Remat, VideoEncoderConfig
from vlmae.models.adapter import ShallowAdapters
from vlmae.models.embeddings import sincos_clip_positions, sincos_positions
from vlmae.models.layers import TOKEN_INIT, VIT_INIT, Block, Dense, block_class, vit_options
from vlmae.models.relative_bias import RelativeBias
from vlmae.models.temporal import Temporal, with_cls_place
from vlmae.models.thinning import ThinningBlock


class VideoFeatures(NamedTuple):
    """What leaves the video encoder."""

    tokens: Float[Array, "b t m d"]  # patch tokens, [CLS] not among them
    frame_cls: Float[Array, "b t d"]  # what stands for a frame: its [CLS], or its mean
    stage_places: tuple[Int[Array, "b t _"], ...]  # that entered, then after each thinning stage
    removed_mask: Bool[Array, "b t n"]  # True where a patch was masked before the encoder

    @property
    def places(self) -> Int[Array, "b t m"]:
        """The patch at which each token stands; NO_PLACE for a fused token."""
        return self.stage_places[-1]

    @property
    def all_tokens(self) -> Float[Array, "b q d"]:
        """The tokens of all frames in one sequence, each frame led by its [CLS]."""
        x = jnp.concatenate([self.frame_cls[:, :, None], self.tokens], axis=2)
        return rearrange(x, "b t m d -> b (t m) d")

    @property
    def frames_apart(self) -> "VideoFeatures":
        """Every frame as a clip of its own, the frames of a clip one after the other."""
        return jax.tree.map(lambda x: rearrange(x, "b t ... -> (b t) 1 ..."), self)


class VideoEncoder(nn.Module):
    """A ViT over the visible patches of each frame; batch and time are folded.

    Attributes:
      config: sizes.
      grid: rows and columns of patches, which fix the positions.
      keep_rate: fraction of the tokens that survive each thinning stage.
      remat, dtype, attention: see `ModelConfig`.
    """

    config: VideoEncoderConfig
    grid: tuple[int, int]
    keep_rate: float = 1.0
    remat: Remat = "none"
    dtype: str = "float32"
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, patches: Float[Array, "b t n p"], mask: PatchMask | None = None
    ) -> VideoFeatures:
        """Encodes the patches that `mask` keeps; without a mask, all of them.

        The others are dropped before the first matrix product, so they cost nothing and get no
        gradient. Only clips (t > 1) go through what needs time.
        """
        b, t, n, _ = patches.shape
        if mask is None:
            kept_ids = jnp.broadcast_to(jnp.arange(n), (b, t, n))
            removed_mask = jnp.zeros((b, t, n), bool)
        else:
            kept_ids, removed_mask = mask
            patches = jnp.take_along_axis(patches, kept_ids[..., None], axis=2)

        x, stages = self._in_chunks(patches, kept_ids)
        if t > 1 and (self.config.time_frames or self.config.time_depth):
            temporal = Temporal(self.config, self.remat, self.dtype, name="temporal")
            tubes = mask is None or self.config.mask.scheme == "tube"
            x = temporal(x, with_cls_place(stages[-1], n), aligned=tubes and len(stages) == 1)
        return VideoFeatures(x[:, :, 1:], x[:, :, 0], stages, removed_mask)

    def _in_chunks(
        self, patches: Float[Array, "b t k p"], kept_ids: Int[Array, "b t k"]
    ) -> tuple[Float[Array, "b t q d"], tuple[Int[Array, "b t _"], ...]]:
        """`_encode`, some frames at a time; the backward pass encodes each chunk again."""
        size, frames = self.config.frames_per_chunk, patches.shape[1]
        if not size or frames <= size:
            return self._encode(patches, kept_ids)
        if frames % size:
            raise ValueError(
                f"model.video.frames_per_chunk={size} does not divide clips of {frames} frames"
            )

        def encode_chunk(encoder: VideoEncoder, carry: tuple, chunk: tuple) -> tuple:
            return carry, encoder._encode(*chunk)

        scan = nn.scan(
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
        """Each frame's tokens, led by what stands for it, and the places at every stage."""
        t, layout = patches.shape[1], self.config.layout
        x = self._embed(patches, kept_ids)
        if layout.joint:
            x = rearrange(x, "(b t) q d -> b (t q) d", t=t)
        x, stages = self._blocks(x, rearrange(kept_ids, "b t k -> (b t) k"))
        if layout.joint:
            x = rearrange(x, "b (t q) d -> (b t) q d", t=t)
        stages = tuple(rearrange(places, "(b t) m -> b t m", t=t) for places in stages)
        return rearrange(self._led(x), "(b t) q d -> b t q d", t=t), stages

    def _embed(
        self, patches: Float[Array, "b t k p"], kept_ids: Int[Array, "b t k"]
    ) -> Float[Array, "f q d"]:
        """Tokens with positions, [CLS] first, frames folded into the batch."""
        width, layout, t = self.config.width, self.config.layout, patches.shape[1]
        embed = Dense(width, dtype=self.dtype, kernel_init=VIT_INIT, name="patch_embed")
        leading, table = self._positions(t)
        table = table[jnp.arange(table.shape[0])[:, None], kept_ids]
        x = rearrange(embed(patches) + table.astype(self.dtype), "b t k d -> (b t) k d")
        if layout.prefix:
            tokens = [self.param("cls", TOKEN_INIT, (width,))[None]]
            if layout.extra_tokens:
                tokens.append(self.param("extra", TOKEN_INIT, (layout.extra_tokens, width)))
            prefix = (jnp.concatenate(tokens) + leading).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape)), x], axis=1)
        return self._norm("input_norm")(x) if layout.input_norm else x

    def _led(self, x: Float[Array, "f q d"]) -> Float[Array, "f r d"]:
        """The normalized patch tokens of a frame after what stands for it: [CLS] or their mean."""
        norm, layout = self._norm("norm"), self.config.layout
        patches = x[:, layout.prefix :]
        first = x[:, :1] if layout.frame_cls == "token" else patches.mean(axis=1, keepdims=True)
        return norm(jnp.concatenate([first, patches], axis=1))

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.config.layout.eps, dtype=self.dtype, name=name)

    def _blocks(
        self, x: Float[Array, "f q d"], places: Int[Array, "g k"]
    ) -> tuple[Float[Array, "f r d"], list[Int[Array, "g _"]]]:
        """The tokens after all blocks; their places at the start and after each thinning stage.

        With joint attention the tokens of all frames of a clip are one row, but not their places.
        """
        config, stages, branch = self.config, [places], None
        adapters = ShallowAdapters(config.adapter, self.dtype, self.attention, name="adapters")
        relative = (config.layout.relative_bias, config.num_heads, self.grid)
        bias_of = RelativeBias(*relative, name="relative_bias")
        for i in range(config.depth):
            bias = bias_of(i, places)
            if self.keep_rate < 1 and i in config.sparsify.stages:
                x, places = self._block(i, thins=True)(x, places, bias)
                stages.append(places)
            else:
                x = self._block(i)(x, bias=bias)
            x, branch = adapters(i, x, branch)
        return x, stages

    def _block(self, i: int, thins: bool = False) -> Block:
        config, layout = self.config, self.config.layout
        options = vit_options(config.num_heads, config.mlp_dim, self.dtype, self.attention) | {
            "eps": layout.eps,
            "activation": layout.activation,
            "layer_scale": layout.layer_scale,
            "name": f"block_{i}",
        }
        if not thins:
            return block_class(Block, self.remat)(**options)
        thinning = {"sparsify": config.sparsify, "keep_rate": self.keep_rate}
        return block_class(ThinningBlock, self.remat)(**options, **thinning)

    def _positions(self, t: int) -> tuple[Float[Array, "#c d"], Float[Array, "#t n d"]]:
        """What is added to a frame's leading tokens, and to its patches at one time or each."""
        (rows, cols), width, prefix = self.grid, self.config.width, self.config.layout.prefix
        if self.config.positions == "sincos_clip":
            table = sincos_clip_positions(t * rows * cols, width)
            return jnp.zeros((1, width)), jnp.asarray(table).reshape(t, rows * cols, width)
        if self.config.positions == "learned":
            table = self.param("positions", TOKEN_INIT, (prefix + rows * cols, width))
            return table[:prefix], table[None, prefix:]
        shape = (rows * cols, width)
        none = self.config.positions == "none"
        table = jnp.zeros(shape) if none else jnp.asarray(sincos_positions(rows, cols, width))
        return jnp.zeros((1, width)), table[None]
