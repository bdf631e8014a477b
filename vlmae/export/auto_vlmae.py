"""Classes for `AutoModel` and `AutoImageProcessor` of transformers, with `trust_remote_code=True`.

Every export carries this file beside `modeling_vlmae.py`; it is imported only there.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import BatchFeature, PretrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import ModelOutput

from .modeling_vlmae import VideoLanguageModel, check_sums, clip_view, normalize


class VlmaeConfig(PretrainedConfig):
    """Fields of `config.json`."""

    model_type = "vlmae"


@dataclass
class VlmaeOutput(ModelOutput):
    """Clips compared with texts, under the names of CLIP's classes."""

    logits_per_video: Tensor | None = None  # [b c], see `scale_similarity`
    logits_per_text: Tensor | None = None  # [c b]
    video_embeds: Tensor | None = None  # [b e], means of the frames' unit vectors
    text_embeds: Tensor | None = None  # [c e], unit vectors


class VlmaeImageProcessor(ImageProcessingMixin):
    """Frames of clips as the model takes them; its fields are `preprocessor_config.json`."""

    model_input_names = ("pixel_values",)

    def __call__(self, videos, return_tensors: str | None = None) -> BatchFeature:
        """Choose, resize, crop and normalize frames: `pixel_values` [b t 3 h w].

        Args:
          videos: a clip, uint8 frames [t h w 3] of any number and size, or a list of clips.
          return_tensors: "pt" or "np"; None returns PyTorch's, too.
        """
        single = getattr(videos, "ndim", 0) == 4
        size = self.crop_size["height"]
        layout = {"pixel_mean": self.image_mean, "pixel_std": self.image_std}
        clips = [torch.as_tensor(x) for x in ([videos] if single else videos)]
        frames = torch.stack([clip_view(x, self.num_frames, size) for x in clips])
        pixels = normalize(frames, layout).movedim(-1, 2).contiguous()
        return BatchFeature({"pixel_values": pixels}, return_tensors or "pt")


class VlmaeModel(VideoLanguageModel, PreTrainedModel):
    """`VideoLanguageModel` with the loading, saving and casting of transformers."""

    config_class = VlmaeConfig
    main_input_name = "pixel_values"

    @classmethod
    def from_pretrained(cls, name, *args, check_files: bool = True, **kwargs):
        """Load from a folder, whose files are compared with `SHA256SUMS`, or from the hub."""
        if check_files and Path(name).is_dir():
            check_sums(Path(name))
        return super().from_pretrained(name, *args, **kwargs)

    def __init__(self, config: VlmaeConfig):
        """Build the model; transformers loads its parameters afterwards."""
        PreTrainedModel.__init__(self, config)
        self.build(config.to_dict())
        self.post_init()

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> VlmaeOutput:
        """Compare each clip with each text; the arguments of `get_video_features` and text's."""
        video = self.get_video_features(pixel_values)
        text = self.get_text_features(input_ids, attention_mask)
        logits = self.scale_similarity(video @ text.T)
        return VlmaeOutput(logits, logits.T, video, text)
