"""Video-language model: encoders, frame selector, fusion, heads. Objectives call its methods."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from vlmae.config.experiment import ExperimentConfig
from vlmae.config.model import ModelConfig
from vlmae.models.attention import has_cudnn_attention, take_rows
from vlmae.models.embeddings import normalize_pixels, patchify
from vlmae.models.frame_selector import FrameChoice, FrameSelector, keep_frames
from vlmae.models.fusion import FUSIONS
from vlmae.models.heads import AnswerDecoder, Classifier, Projection, WordTransform
from vlmae.models.layers import BERT_INIT, Compute, Dense
from vlmae.models.multiway import WordReader
from vlmae.models.pixel_decoder import PixelDecoder, PixelPrediction
from vlmae.models.text_encoder import TEXT_POOLINGS, TextEncoder, TextFeatures
from vlmae.models.video_encoder import VideoEncoder, VideoFeatures
from vlmae.ops.masking import PatchMask
from vlmae.parallel.sharding import keep_rows

INITIAL_TEMPERATURE = 0.07
TEMPERATURE_RANGE = (0.001, 0.5)


class VideoLanguageModel(nn.Module):
    """SMAUG's and MuLTI's model. A method that is never called leaves no parameters behind.

    Attributes:
      config: sizes and options of all parts.
      image_size: height and width of the frames in pixels.
      full_size: those of the frames for which the tables of positions are; 0: `image_size`.
      deterministic: no dropout and no noise, and evaluation's keep rate.
    """

    config: ModelConfig
    image_size: int
    deterministic: bool = True
    full_size: int = 0

    def setup(self) -> None:
        """Make all parts; parameters arise where a part is called."""
        config, deterministic = self.config, self.deterministic
        # One object for all parts, so that blocks of equal sizes are equal, and traced once.
        # `build_model` has resolved it for the device that the model is compiled for.
        attention = resolve_attention(config) if config.attention == "auto" else config.attention
        compute = Compute(config.dtype, attention, config.remat, config.gradient_dtype)
        sparsify = config.video.sparsify
        # Static, so a rate of each mode is a program of its own.
        keep_rate = sparsify.eval_keep_rate if deterministic else sparsify.keep_rate
        full_grid = self._grid_of(self.full_size or self.image_size)
        self.video_encoder = VideoEncoder(config.video, self.grid, keep_rate, compute, full_grid)
        self.text_encoder = TextEncoder(config.text, deterministic, compute)
        self.frame_selector = FrameSelector(config.selector, deterministic, compute)
        fusion = FUSIONS[config.fusion.kind]
        self.fusion = fusion(config.fusion, config.text, deterministic, compute)
        self.word_reader = WordReader(config.text, compute)
        self.pixel_decoder = PixelDecoder(
            config.pixel_decoder,
            self.grid,
            config.video.patch_pixels,
            deterministic,
            compute,
            full_grid,
        )
        self.video_projection = Projection(config.embed_dim)
        self.text_projection = Projection(config.embed_dim)
        # Heads are float32: they are tiny, and their logits are compared.
        self.match_head = Dense(2, kernel_init=BERT_INIT)
        self.word_transform = WordTransform(compute)
        self.classifier = Classifier(config.num_classes)
        self.answer_decoder = AnswerDecoder(
            config.text, config.answer_depth, deterministic, compute
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of a frame."""
        return self._grid_of(self.image_size)

    def _grid_of(self, size: int) -> tuple[int, int]:
        side = size // self.config.video.patch_size
        return side, side

    def num_times(self, num_frames: int) -> int:
        """Count the times at which a clip has patches: one for each tubelet of frames."""
        return max(1, num_frames // self.config.video.layout.tubelet)

    def patches(self, video: UInt8[Array, "b f h w 3"]) -> Float[Array, "b t n p"]:
        """Cut frames into patches of normalized pixels: encoder's input and decoder's target.

        Raises:
          ValueError: the frames are not of `image_size`, or do not divide into patches or tubelets.
        """
        if video.shape[2:4] != (self.image_size, self.image_size):
            raise ValueError(f"frames of {video.shape[2:4]}, but image_size is {self.image_size}")
        encoder = self.config.video
        pixels = normalize_pixels(video, encoder.layout)
        return patchify(pixels, encoder.patch_size, encoder.layout.tubelet)

    def encode_video(
        self, video: UInt8[Array, "b f h w 3"], mask: PatchMask | None = None
    ) -> VideoFeatures:
        """Encode the patches that the mask keeps, or all of them."""
        return self.video_encoder(self.patches(video), mask)

    def encode_text(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> TextFeatures:
        """Encode token ids; the mask is True on valid tokens, a prefix of each row."""
        return self.text_encoder(ids, mask)

    def embed_video(self, video: VideoFeatures) -> Float[Array, "b t e"]:
        """Project frames to unit vectors; a clip's similarity is the mean over its frames."""
        return self.video_projection(video.frame_cls)

    def embed_text(self, text: TextFeatures) -> Float[Array, "b e"]:
        """Project texts to unit vectors."""
        return self.text_projection(TEXT_POOLINGS[self.config.text.pooling](text))

    @nn.compact
    def temperature(self, initial: float = INITIAL_TEMPERATURE) -> Float[Array, ""]:
        """Return the learned temperature of the contrastive similarities, clamped.

        The gradient passes through the clamp: a parameter at or beyond a bound comes back.
        """
        value = self.param("temperature", nn.initializers.constant(initial), ())
        # A straight-through clamp; a clip in the forward pass alone has no gradient outside, and a
        # parameter that leaves the range dies.
        clamped = jax.lax.stop_gradient(jnp.clip(value, *TEMPERATURE_RANGE))
        return clamped + (value - jax.lax.stop_gradient(value))

    @nn.compact
    def logit_bias(self, initial: float = 0.0) -> Float[Array, ""]:
        """Return the learned bias that the sigmoid loss adds to its logits (SigLIP)."""
        return self.param("logit_bias", nn.initializers.constant(initial), ())

    def fuse(
        self, video: VideoFeatures, text: TextFeatures, rows: Int[Array, "p n"] | None = None
    ) -> Float[Array, "b q d"]:
        """Fuse texts with clips, of which only the frames selected for the text are read.

        Args:
          video: features of the clips.
          text: features of the texts.
          rows: the clip that each text reads, see `take_rows`; a clip's own products are then
            computed once, however many texts read it. None: text i reads clip i.

        Returns:
          The text's tokens, or with a condensing fusion latents of both; the text's [CLS] first.
        """
        # Images have one frame: nothing to choose, and no parameters in runs on images alone.
        if not self._chooses_frames(video):
            return self.fusion(text, video, rows)
        if rows is not None:  # texts select other frames, so they no longer share a clip's tokens
            video = jax.tree.map(lambda x: take_rows(x, rows), video)
        return self.fusion(text, keep_frames(video, self.frame_selector(text, video)))

    def choose_frames(self, video: VideoFeatures, text: TextFeatures) -> FrameChoice | None:
        """Select the frames of clip i that are fused with text i; None if all are (images)."""
        return self.frame_selector(text, video) if self._chooses_frames(video) else None

    def _chooses_frames(self, video: VideoFeatures) -> bool:
        return self.config.selector.kind != "none" and video.tokens.shape[1] > 1

    def match(self, fused: Float[Array, "b q d"]) -> Float[Array, "b 2"]:
        """Compute logits of (no match, match) from the fused [CLS], float32."""
        return self.match_head(fused[:, 0].astype(jnp.float32))

    @nn.compact
    def choose(self, fused: Float[Array, "b q d"], num_options: int) -> Float[Array, "b c"]:
        """Compute logits of a question's options, or the score of one, from the fused [CLS]."""
        # Made here, since only the call knows the number: 4 options in one text, or 1 alone.
        head = Dense(num_options, kernel_init=BERT_INIT, name="choice_head")
        return head(fused[:, 0].astype(jnp.float32))

    def classify(self, fused: Float[Array, "b q d"]) -> Float[Array, "b c"]:
        """Compute logits of the answers or labels from the fused [CLS], float32."""
        return self.classifier(fused[:, 0])

    def decode_answer(
        self, ids: Int[Array, "b a"], text: TextFeatures, fused: Float[Array, "b q d"]
    ) -> Float[Array, "b a v"]:
        """Compute float32 logits of the token after each of `ids`, an answer's beginning."""
        lengths = None if self.fusion.condenses_text else text.lengths  # latents have no padding
        return self.answer_decoder(ids, fused, lengths)

    def fused_words(
        self, text: TextFeatures, fused: Float[Array, "b q d"]
    ) -> Float[Array, "b l d"]:
        """Return one fused token for each token of the text, whatever the fusion."""
        return self.word_reader(text, fused) if self.fusion.condenses_text else fused

    @nn.compact
    def predict_words(self, words: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Compute logits of every vocabulary entry for each token, float32, with tied weights."""
        bias = self.param("word_bias", nn.initializers.zeros, (self.config.text.vocab_size,))
        # The largest activation of the model; XLA may otherwise shard it like the word table.
        scores = keep_rows(self.text_encoder.token_logits(self.word_transform(words)))
        return scores + bias

    def decode_pixels(self, video: VideoFeatures) -> PixelPrediction:
        """Predict the pixels of every patch, or in training of a part (`target_ratio`)."""
        return self.pixel_decoder(video)


def clamp_temperature(params: PyTree) -> PyTree:
    """Clamp the temperature of a model's parameters, after each update.

    Otherwise Adam's momentum carries it far beyond a bound, from where it needs long to come back.
    """
    if "temperature" not in params:  # without VTC
        return params
    return {**params, "temperature": jnp.clip(params["temperature"], *TEMPERATURE_RANGE)}


def build_model(
    config: ExperimentConfig, *, deterministic: bool = True, device: Any = None
) -> VideoLanguageModel:
    """Build the model of an experiment; without a GPU it attends by XLA.

    In training (not `deterministic`), frames are of `data.train_size`, if that is set.

    Args:
      config: the experiment.
      deterministic: for evaluation.
      device: a JAX device, one of those that the model is compiled for; None: the first of this
        machine.
    """
    # Evaluation and export run where training's kernel may not; parameters are the same.
    model, full_size = config.model, config.data.image_size
    model = dataclasses.replace(model, attention=resolve_attention(model, device))
    size = full_size if deterministic else config.data.frame_size
    return VideoLanguageModel(model, size, deterministic, full_size)


def resolve_attention(model: ModelConfig, device: Any = None) -> str:
    """Choose the attention kernel: "xla" or "cudnn", see `model.attention`."""
    if model.attention == "xla" or model.unfit_for_cudnn():
        return "xla"
    return "cudnn" if has_cudnn_attention(device or jax.devices()[0]) else "xla"
