"""The model as transformers loads it: `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`.

This file lies in every export beside `modeling_vlmae.py`, and is imported only there.
"""

from transformers import PretrainedConfig, PreTrainedModel

from .modeling_vlmae import VideoLanguageModel


class VlmaeConfig(PretrainedConfig):
    """The fields of `config.json`."""

    model_type = "vlmae"


class VlmaeModel(VideoLanguageModel, PreTrainedModel):
    """`VideoLanguageModel`, with what transformers adds: hub, devices, types."""

    config_class = VlmaeConfig
    main_input_name = "video"

    def __init__(self, config: VlmaeConfig):
        PreTrainedModel.__init__(self, config)
        self.build(config.to_dict())
        self.post_init()
