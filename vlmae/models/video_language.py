"""The one composition: video encoder, text encoder, fusion, heads. Objectives call its methods."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from vlmae.config import ExperimentConfig
from vlmae.masking import PatchMask
from vlmae.model_config import ModelConfig
from vlmae.models.answer_decoder import AnswerDecoder
from vlmae.models.embeddings import normalize_pixels, patchify
from vlmae.models.frame_selector import FrameChoice, FrameSelector, keep_frames
from vlmae.models.fusion import ConcatFusion, CrossAttentionFusion
from vlmae.models.heads import Classifier, Projection, WordTransform
from vlmae.models.layers import BERT_INIT, Dense, take_rows
from vlmae.models.multiway import MultiWayFusion, WordReader
from vlmae.models.pixel_decoder import Painted, PixelDecoder
from vlmae.models.text_encoder import TextEncoder, TextFeatures
from vlmae.models.video_encoder import VideoEncoder, VideoFeatures
from vlmae.sharding import keep_rows

INITIAL_TEMPERATURE = 0.07
TEMPERATURE_RANGE = (0.001, 0.5)
FUSIONS = {
    "cross_attention": CrossAttentionFusion,
    "concat": ConcatFusion,
    "multiway": MultiWayFusion,
}


class VideoLanguageModel(nn.Module):
    """SMAUG's and MuLTI's model. A method that is never called leaves no parameters behind.

    Attributes:
      config: sizes of all parts.
      image_size: height and width of the frames in pixels.
      deterministic: no dropout and no noise, and evaluation's keep rate.
    """

    config: ModelConfig
    image_size: int
    deterministic: bool = True

    def setup(self):
        config = self.config
        compute = {"remat": config.remat, "dtype": config.dtype, "attention": config.attention}
        mode = {"deterministic": self.deterministic, **compute}
        sparsify = config.video.sparsify
        keep_rate = sparsify.eval_keep_rate if self.deterministic else sparsify.keep_rate
        self.video_encoder = VideoEncoder(config.video, self.grid, keep_rate, **compute)
        self.text_encoder = TextEncoder(config.text, **mode)
        self.frame_selector = FrameSelector(config.selector, self.deterministic, config.dtype)
        self.fusion = FUSIONS[config.fusion.kind](config.fusion, config.text, **mode)
        self.word_reader = WordReader(config.text, config.dtype, config.attention)
        self.pixel_decoder = PixelDecoder(
            config.pixel_decoder, self.grid, config.video.patch_pixels, **mode
        )
        self.video_projection = Projection(config.embed_dim)
        self.text_projection = Projection(config.embed_dim)
        self.match_head = Dense(2, kernel_init=BERT_INIT)
        self.word_transform = WordTransform(config.dtype)
        self.classifier = Classifier(config.num_classes)
        self.answer_decoder = AnswerDecoder(
            config.text,
            config.answer_depth,
            self.deterministic,
            config.remat,
            config.dtype,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a frame."""
        side = self.image_size // self.config.video.patch_size
        return side, side

    def num_times(self, num_frames: int) -> int:
        """Times at which a clip has patches: one for each tubelet of frames."""
        return max(1, num_frames // self.config.video.layout.tubelet)

    def patches(self, video: UInt8[Array, "b f h w 3"]) -> Float[Array, "b t n p"]:
        """The normalized pixels of every patch: the encoder's input and the decoder's target.

        Raises:
          ValueError: the frames are not of `image_size`.
        """
        if video.shape[2:4] != (self.image_size, self.image_size):
            raise ValueError(f"frames of {video.shape[2:4]}, but image_size is {self.image_size}")
        encoder = self.config.video
        pixels = normalize_pixels(video, encoder.layout)
        return patchify(pixels, encoder.patch_size, encoder.layout.tubelet)

    def encode_video(
        self, video: UInt8[Array, "b f h w 3"], mask: PatchMask | None = None
    ) -> VideoFeatures:
        """Encodes the patches that the mask keeps, or all of them."""
        return self.video_encoder(self.patches(video), mask)

    def encode_text(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> TextFeatures:
        """Encodes word ids; the mask is True on real tokens."""
        return self.text_encoder(ids, mask)

    def embed_video(self, video: VideoFeatures) -> Float[Array, "b t e"]:
        """Unit vectors of the frames; a clip's similarity is the mean over its frames."""
        return self.video_projection(video.frame_cls)

    def embed_text(self, text: TextFeatures) -> Float[Array, "b e"]:
        """Unit vectors of the texts."""
        return self.text_projection(getattr(text, self.config.text.pooling))

    @nn.compact
    def temperature(self) -> Float[Array, ""]:
        """The learned temperature of the contrastive similarities, clamped."""
        value = self.param("temperature", nn.initializers.constant(INITIAL_TEMPERATURE), ())
        return jnp.clip(value, *TEMPERATURE_RANGE)

    def fuse(
        self, text: TextFeatures, video: VideoFeatures, rows: Int[Array, "p n"] | None = None
    ) -> Float[Array, "b q d"]:
        """Tokens of text and video that have met, the text's [CLS] first.

        They are the text tokens, or with the multiway fusion latents of both. Of the clip only the
        frames chosen for the text take part. Row i of the texts meets row i of the clips, or the
        one that `rows` says, see `take_rows`: what a clip gives by itself is then computed once.
        """
        if not self._chooses_frames(video):
            return self.fusion(text, video, rows)
        if rows is not None:
            video = jax.tree.map(lambda x: take_rows(x, rows), video)
        return self.fusion(text, keep_frames(video, self.frame_selector(text, video)))

    def choose_frames(self, text: TextFeatures, video: VideoFeatures) -> FrameChoice | None:
        """The frames of each clip that its text's fusion reads; None where all are (images)."""
        return self.frame_selector(text, video) if self._chooses_frames(video) else None

    def _chooses_frames(self, video: VideoFeatures) -> bool:
        return self.config.selector.kind != "none" and video.tokens.shape[1] > 1

    def match(self, fused: Float[Array, "b q d"]) -> Float[Array, "b 2"]:
        """Logits of (does not match, matches) from the fused [CLS], float32."""
        return self.match_head(fused[:, 0].astype(jnp.float32))

    @nn.compact
    def choose(self, fused: Float[Array, "b q d"], num_options: int) -> Float[Array, "b c"]:
        """Logits of a question's options, or one option's score, from the fused [CLS], float32."""
        head = Dense(num_options, kernel_init=BERT_INIT, name="choice_head")
        return head(fused[:, 0].astype(jnp.float32))

    def classify(self, fused: Float[Array, "b q d"]) -> Float[Array, "b c"]:
        """Logits of the answers or labels, from the fused [CLS], float32."""
        return self.classifier(fused[:, 0])

    def decode_answer(
        self, ids: Int[Array, "b a"], text: TextFeatures, fused: Float[Array, "b q d"]
    ) -> Float[Array, "b a v"]:
        """Logits of the word after each word of an answer to the fused question, float32."""
        whole = self.config.fusion.kind == "multiway"  # its latents are all valid
        return self.answer_decoder(ids, fused, None if whole else text.lengths)

    def fused_words(
        self, text: TextFeatures, fused: Float[Array, "b q d"]
    ) -> Float[Array, "b l d"]:
        """What `fuse` made of each word of the text."""
        return self.word_reader(text, fused) if self.config.fusion.kind == "multiway" else fused

    @nn.compact
    def predict_words(self, words: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Logits of every word at every place, float32; the output table is tied to the input."""
        bias = self.param("word_bias", nn.initializers.zeros, (self.config.text.vocab_size,))
        scores = keep_rows(self.text_encoder.word_scores(self.word_transform(words)))
        return scores.astype(jnp.float32) + bias

    def decode_pixels(self, video: VideoFeatures) -> Painted:
        """Predicted pixels of every patch, or of some in training (`target_ratio`)."""
        return self.pixel_decoder(video)


def build_model(config: ExperimentConfig, *, deterministic: bool = True) -> VideoLanguageModel:
    """The model of an experiment; where there is no GPU, with XLA's attention."""
    model = config.model
    if jax.default_backend() != "gpu":
        model = dataclasses.replace(model, attention="xla")
    return VideoLanguageModel(model, config.data.image_size, deterministic)
